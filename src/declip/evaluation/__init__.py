"""Judge models on pairs: retrieval where there are captions, classification where there are labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from declip.model.pretrained import LoadedModel
    from declip.pairs import Data
    from declip.progress import Progress

TASKS = ("retrieval", "zero-shot", "linear-probe")


def evaluate(
    model: LoadedModel | str | Path,
    data: str | Sequence[str],
    tasks: Sequence[str] | None = None,
    data_options: Data | None = None,
    progress: Progress | None = None,
    templates: Sequence[str] | None = None,
    *,
    against: Sequence[LoadedModel | str | Path] = (),
    train: str | Sequence[str] = (),
    shots: Sequence[int] = (),
    root: str | Path = ".",
    seed: int = 0,
) -> dict[str, Any]:
    """Judge one or more models on each set of pairs by itself.

    Args:
        model: a loaded model, or what ``declip.load`` takes.
        data: one or more sources, or names of known sets (``declip evaluate --list``).
        tasks: ``retrieval``, ``zero-shot``, ``linear-probe``; by default whatever a set has captions or labels for,
            and linear probes where there are labelled pairs to learn from.
        data_options: names of the columns, as in a recipe's ``data`` section.
        progress: called with (what, done, total) as the work goes on.
        templates: zero-shot prompts with ``{}`` for the class name, or ``openai`` or ``simple``. By default known sets
            have their own, and others ``openai``.
        against: models to judge beside the first, on the same pairs. Run folders whose recipes differ in the seed alone
            also give rows of their mean over seeds (``runs``).
        train: labelled pairs that linear probes learn from; known sets bring their own.
        shots: linear probes also learn from so many pairs of each class.
        root: the folder that known sets are in.
        seed: of splits, shots and bootstrap draws.

    Returns ``{"model": name, "results": [{"model", "data", "task", "items", "skipped", "undecodable", "metrics",
    "intervals"}], "comparisons": [{"models", "data", "task", "metric", "difference", "interval", "p"}]}``: items are
    the images judged, undecodable those of them that cannot be read, which count as missed, skipped the pairs that
    there is nothing to ask about; metrics are in percent but for median ranks (1 is best), intervals are of 95 %.
    Raises InputError where a source cannot be read, a task is unknown, or a source has nothing for it.
    """
    from declip.evaluation.opening import open_tests
    from declip.evaluation.suite import Asked, evaluate_models

    asked = Asked(tasks, templates, shots, seed)
    tests = open_tests(data, tasks, data_options, train=train, root=root)
    return evaluate_models([model, *against], tests, asked, progress).rows()
