"""Models side by side on sets of pairs: everything is checked first, then each model embeds each set once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from declip.evaluation import Progress
from declip.evaluation.certainty import add_intervals, compare, main_metrics, same_queries
from declip.evaluation.details import Details
from declip.evaluation.embedding import Encoder, embed_source
from declip.evaluation.judged import Comparison, Judged
from declip.evaluation.sets import TestSet
from declip.evaluation.tasks import (
    embed_captions,
    labelled,
    possible_tasks,
    retrieval,
    zero_shot,
    zero_shot_classes,
)


@dataclass
class Evaluation:
    """All that was found: by model, set and task; between models; and, where asked for, what a report shows."""

    results: list[Judged] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    details: list[Details] = field(default_factory=list)


def evaluate_models(
    models: Sequence[Callable[[], Encoder]],
    tests: Sequence[TestSet],
    templates: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    *,
    seed: int = 0,
    shots: Sequence[int] = (),
    progress: Progress | None = None,
) -> Evaluation:
    """Judge each model on each set.

    models: what opens each; one is held at a time
    """
    found = Evaluation()
    for open_model in models:
        model = open_model()
        for test in tests:
            found.results += judge(model, test, templates, tasks, seed=seed, shots=shots, progress=progress)
    pairs = combinations(found.results, 2)
    for ours, theirs in pairs:
        if ours.model != theirs.model and same_queries(ours, theirs):
            metric = next(test.metric for test in tests if test.name == ours.data)
            found.comparisons += [compare(ours, theirs, name, seed) for name in main_metrics(ours, metric)]
    return found


def judge(
    model: Encoder,
    test: TestSet,
    templates: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    *,
    seed: int = 0,
    shots: Sequence[int] = (),
    progress: Progress | None = None,
) -> list[Judged]:
    """One model on one set, task by task."""
    embedded = embed_source(model, test.source, test.name, progress)
    results = []
    for task in tasks or possible_tasks(test, embedded):
        judged = Judged(model.name, test.name, task, broken=embedded.broken)
        if task == "retrieval":
            retrieval(test, embedded, embed_captions(model, test, embedded, progress), judged)
        elif task == "zero-shot":
            of = labelled(test, embedded)
            zero_shot(embedded, of, zero_shot_classes(model, test, of.names, templates, progress), judged)
        else:
            results += probes(model, test, embedded, judged, shots, seed, progress)
            continue
        add_intervals(judged, seed)
        results.append(judged)
    return results
