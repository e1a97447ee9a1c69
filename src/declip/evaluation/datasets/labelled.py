"""What a dataset is to the judges: images with class numbers, the classes' names and prompts, or with captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from declip.data.sources import Source
from declip.data.sources.table import TableSource
from declip.data.storage import Storage
from declip.errors import InputError
from declip.evaluation.datasets.catalogue import Metric
from declip.pairs import Data

Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class LabelledSource:
    """A split of a dataset.

    name: of the benchmark, or what the user called the data; split: which one this is; source: its images; labels:
    the class of each image, ``[images]``, () of a set that has captions only; classes: their names, as prompts say
    them; templates: prompts with ``{}``; metric: what is reported of it; folds: into how many parts, in order, it is
    cut for retrieval.
    """

    name: str
    split: str
    source: Source
    labels: Labels
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    metric: Metric
    folds: int = 1

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """What the reader of a layout finds: labels are None where the set has captions alone.

    classes and templates are () where the files say none.
    """

    source: Source
    labels: Labels | None = None
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()


def check_labels(where: str, source: Source, labels: Labels, classes: int) -> None:
    """Labels that are numbers of classes.

    Raises InputError where there are no images, one's label is outside the class list, or all are of one class.
    """
    if not len(labels):
        raise InputError(f"{where} holds no images: check that the folder is complete.")
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        i = int(outside[0])
        raise InputError(
            f"{source.where(i)}: the label {labels[i]} is outside the {classes} classes of {where}, which are counted "
            "from 0: correct the labels or the list of classes."
        )
    if labels.min() == labels.max():
        raise InputError(
            f"All {len(labels):,} images of {where} are of one class: there is nothing to tell apart; give images of "
            "at least two."
        )


def spoken(names: Sequence[str]) -> tuple[str, ...]:
    """Names as folders and lists have them, as a prompt says them: spaces for underscores."""
    return tuple(" ".join(name.replace("_", " ").split()) for name in names)


def numbered(source: Source, classes: Sequence[str]) -> Labels:
    """The number of the class of each image: [images]. Labels are numbers already, or names of `classes`.

    Raises InputError where an image has no label or one that is no class.
    """
    numbers = {key_of(name): number for number, name in enumerate(classes)}
    times = Counter(map(key_of, classes))
    labels = np.empty(len(source), np.int64)
    for i in range(len(source)):
        label = source.label(i)
        if label is None:
            raise InputError(f"{source.where(i)}: there is no label; give it one, or leave the image out.")
        key = key_of(label)
        if times[key] > 1:
            raise InputError(
                f"{source.where(i)}: the label {label!r} stands for several classes: give each a name of its own, or "
                "its number."
            )
        found = numbers.get(key)
        if found is None:
            try:
                found = int(label)
            except ValueError:
                raise InputError(
                    f"{source.where(i)}: the label {label!r} is outside the list of {len(classes)} classes: correct "
                    "the label or the list."
                ) from None
        labels[i] = found
    return labels


def key_of(name: str) -> str:
    """What is the same in all spellings of a class name."""
    return name.replace("_", " ").replace("/", " ").strip().lower()


def images_in(
    where: str,
    folder: str,
    paths: Sequence[str],
    *,
    labels: Labels | None = None,
    classes: Sequence[str] = (),
    captions: Sequence[Sequence[str]] | None = None,
) -> TableSource:
    """Image files as a source: their paths are relative to the folder, and are their keys.

    where: what messages call it, the list that names the files or the folder. Labels outside the classes are left out
    here, and refused by ``check_labels``.
    """
    names = pa.array(list(paths), pa.string())
    of_class = None
    if labels is not None:
        known = (labels >= 0) & (labels < len(classes))
        indices = pa.array(np.where(known, labels, 0), pa.int32(), mask=~known)
        of_class = pa.DictionaryArray.from_arrays(indices, pa.array(list(classes), pa.string()))
    return TableSource(
        name=where,
        file=where,
        folder=folder,
        storage=Storage.of(Data()),
        need_captions=captions is not None,
        image_column=names,
        caption_columns=[] if captions is None else [pa.array(captions, pa.list_(pa.string()))],
        label_column=of_class,
        key_column=names,
    )
