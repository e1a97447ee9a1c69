"""From what the user named to test sets and models; all of it is checked before a model is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from declip.data.sources import open_sources
from declip.errors import InputError
from declip.evaluation import TASKS
from declip.evaluation.datasets import benchmark, download, find, open_dataset
from declip.evaluation.embedding import Encoder
from declip.evaluation.sets import TestSet
from declip.pairs import Data

_JUDGED = ("test", "val")  # which of a folder's splits is judged where it also has one to train on
_METRICS = {"accuracy": "top1", "mean_per_class": "mean_per_class", "recall": "text_to_image_r1"}


def open_tests(
    data: str | Sequence[str],
    tasks: Sequence[str] | None,
    options: Data | None = None,
    *,
    train: str | Sequence[str] = (),
    root: str | Path = ".",
    fetch: bool = False,
) -> list[TestSet]:
    """A test set for each name of a known set or source.

    train: labelled pairs that linear probes of sources learn from; fetch: known sets that are not in `root`.
    Raises InputError where a task is unknown, a set is named twice, or something cannot be opened.
    """
    for task in tasks or ():
        if task not in TASKS:
            raise InputError(f"There is no task {task!r}: choose from {', '.join(TASKS)}.")
    specs = [data] if isinstance(data, str) else [str(spec) for spec in data]
    if not specs:
        raise InputError("No data was given: name pairs, or a known set (declip evaluate --list).")
    if doubled := next((spec for spec in specs if specs.count(spec) > 1), None):
        raise InputError(f"{doubled} is named twice: once is enough.")
    options = options or Data()
    if "retrieval" not in (tasks or ()):  # sentences made of class names are no captions to be found again
        options = options.model_copy(update={"templates": []})
    learnt = _labelled([train] if isinstance(train, str) else list(train), options) if train else None
    return [
        _known(spec, tasks, Path(root), fetch) if _is_name(spec) else _own(spec, tasks, options, learnt)
        for spec in specs
    ]


def _is_name(spec: str) -> bool:
    """Whether a spec names a set rather than a place: a word without a path, an ending or a kind in front."""
    return not (os.path.exists(os.path.expanduser(spec)) or any(sign in spec for sign in "/\\.:*{"))


def _own(spec: str, tasks: Sequence[str] | None, options: Data, train: TestSet | None) -> TestSet:
    folder = Path(spec).expanduser()
    if (folder / "train").is_dir() and (judged := next((s for s in _JUDGED if (folder / s).is_dir()), None)):
        spec, train = str(folder / judged), train or _labelled([str(folder / "train")], options)
    source = open_sources([spec], options, need_captions="retrieval" in (tasks or ()))
    if train is None and "linear-probe" in (tasks or ()):
        raise InputError(f"A linear probe on {spec} has nothing to learn from: give labelled pairs with --train.")
    return TestSet(spec, source, train=train)


def _labelled(specs: list[str], options: Data) -> TestSet:
    source = open_sources(specs, options, need_captions=False)
    return TestSet(source.name, source)


def _known(name: str, tasks: Sequence[str] | None, root: Path, fetch: bool) -> TestSet:
    known = benchmark(name)
    if fetch and find(known.name, root) is None:
        download(known.name, root)
    chosen = tuple(task for task in known.tasks if not tasks or task in tasks)
    if not chosen:
        raise InputError(f"{known.title} is for {' and '.join(known.tasks)}, not for {' or '.join(tasks or ())}.")
    test = _set(name, root, None)
    train = validation = None
    if "linear-probe" in chosen and known.train:
        train = _set(name, root, known.train)
        if known.search:
            train, validation = (_set(name, root, split) for split in known.search)
    return TestSet(**{**vars(test), "tasks": chosen, "train": train, "validation": validation})


def _set(name: str, root: Path, split: str | None) -> TestSet:
    found = open_dataset(name, root, split)
    classified = bool(len(found.labels))
    return TestSet(
        found.name,
        found.source,
        classes=tuple(found.classes) if classified else None,
        labels=found.labels if classified else None,
        templates=tuple(found.templates) or None,
        metric=_METRICS[found.metric],
        folds=found.folds,
    )


def openers(models: Sequence[Any], precision: str = "float32") -> list[Callable[[], Encoder]]:
    """What opens each model, given as such or by what ``declip.load`` takes.

    precision: float32 or bfloat16, of the image towers that are opened here.

    Raises InputError where one is named twice.
    """
    names = [str(model) if isinstance(model, str | Path) else model.name for model in models]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"The model {doubled} is named twice: it would be compared with itself.")
    return [_opener(model, precision) for model in models]


def _opener(model: Any, precision: str) -> Callable[[], Encoder]:
    if not isinstance(model, str | Path):
        return lambda: model

    def open_model() -> Encoder:
        from declip.model.pretrained import load

        opened = load(model)
        return opened.embed_images_in_bfloat16() if precision == "bfloat16" else opened

    return open_model
