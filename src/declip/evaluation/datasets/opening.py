"""From a dataset's name to its images: looked for on disk, read, checked; and what is there of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from declip.errors import InputError
from declip.evaluation.datasets.catalogue import BENCHMARKS, Benchmark, benchmark
from declip.evaluation.datasets.layouts import GENERAL, Found, parts_of_split, splits_there
from declip.evaluation.datasets.layouts import find as find_layout
from declip.evaluation.datasets.names import class_names, templates

if TYPE_CHECKING:
    from declip.evaluation.datasets.labelled import LabelledSource, Read


def find(name: str, root: str | Path | None) -> Found | None:
    """A benchmark's files under a folder; None where they are not, or no folder is given.

    Raises InputError where there is no benchmark of that name.
    """
    known = benchmark(name)
    return None if root is None else find_layout(known.name, Path(root).expanduser())


def open_dataset(name: str, root: str | Path, split: str | None = None) -> LabelledSource:
    """Open a benchmark.

    Args:
        name: in any spelling that ``benchmark`` takes.
        root: the folder that it is looked for in.
        split: which one; by default the one that the benchmark is judged on. ``train`` and ``test`` also stand for
            what is used as such, as ``trainval`` is of Oxford-IIIT Pets.

    Raises InputError where there is no such dataset or split, its files are not found or not whole, a label is outside
    the class list, a class name is empty or there twice, or all images are of one class.
    """
    known = benchmark(name)
    chosen = _split(known, split)
    found = find_layout(known.name, Path(root).expanduser())
    if found is None:
        raise InputError(
            f"{known.title} is not in {root}: it needs {known.needs}; get it from {known.source}, or say --download."
        )
    return _labelled(known, chosen, found)


def listing(root: str | Path | None = None) -> list[dict[str, Any]]:
    """What there is to judge on, a row a benchmark: its facts, and ``found``: where it is under the root, or None."""
    rows = []
    for known in BENCHMARKS.values():
        place = find(known.name, root)
        facts = asdict(known)
        row = {
            name: facts[name] for name in ("name", "title", "tasks", "metric", "splits", "classes", "needs", "source")
        }
        rows.append({**row, "found": str(place.folder) if place else None, "layout": place.layout if place else None})
    return rows


def _split(known: Benchmark, split: str | None) -> str:
    """A split's name as the benchmark has it."""
    uses = {None: known.test, "test": known.test, "train": known.train}
    if split in known.splits:
        return str(split)
    if chosen := uses.get(split):
        return chosen
    raise InputError(f"{known.title} has no split {split!r}: choose {' or '.join(known.splits)}.")


def _labelled(known: Benchmark, split: str, found: Found) -> LabelledSource:
    import numpy as np

    from declip.evaluation.datasets.labelled import LabelledSource, check_labels
    from declip.evaluation.sets import check_classes

    read = _general(known, split, found) if found.layout in GENERAL else _read(known, split, found)
    where = f"{known.title} in {found.folder}"
    labels, classes = read.labels, read.classes
    if labels is not None:
        if len(classes) != known.classes:
            raise InputError(
                f"{where} names {len(classes)} classes where there are {known.classes}: complete it, or judge it by "
                "its path, as a dataset of your own."
            )
        # Among the published names of ImageNet's classes, "missile" and "sunglasses" stand twice.
        check_classes(where, classes, repeated=known.names == "imagenet1k")
        check_labels(where, read.source, labels, len(classes))
    prompts = read.templates or (templates(known.names) if known.names else ())
    return LabelledSource(
        name=known.name,
        split=split,
        source=read.source,
        labels=np.empty(0, np.int64) if labels is None else labels,
        classes=classes,
        templates=prompts,
        metric=known.metric,
        folds=known.folds,
    )


def _general(known: Benchmark, split: str, found: Found) -> Read:
    """A split in a layout that any set may have."""
    from declip.evaluation.datasets.general import read_general

    parts = parts_of_split(found, split)
    if parts is None:
        there = " and ".join(splits_there(found))
        raise InputError(f"{known.title} in {found.folder} has no split {split}: it has {there}.")
    return read_general(found, parts, "retrieval" in known.tasks, class_names(known.names))


def _read(known: Benchmark, split: str, found: Found) -> Read:
    """A split in the layout of the set's own archive."""
    from declip.evaluation.datasets import captioned, cifar, folders, imagenet

    readers: dict[str, Callable[[Benchmark, Path, str], Read]] = {
        "pets": folders.read_pets,
        "cifar": cifar.read_cifar,
        "sun397": folders.read_sun397,
        "food101": folders.read_food101,
        "flowers": folders.read_flowers,
        "cars": folders.read_cars,
        "caltech101": folders.read_caltech101,
        "aircraft": folders.read_aircraft,
        "dtd": folders.read_dtd,
        "imagenet": imagenet.read_imagenet,
        "imagenet-train": imagenet.read_imagenet,
        "imagenet-v2": imagenet.read_imagenet_v2,
        "objectnet": imagenet.read_objectnet,
        "karpathy": captioned.read_karpathy,
        "coco": captioned.read_coco,
        "flickr-lists": captioned.read_flickr_lists,
        "tokens": captioned.read_tokens,
    }
    return readers[found.layout](known, found.folder, split)
