"""ImageNet and the sets that test its classes elsewhere: V2, A, R, Sketch and ObjectNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from declip.data.sources import Source
from declip.data.sources.base import Subset
from declip.data.sources.folder import open_folder
from declip.data.sources.table import TableSource
from declip.errors import InputError
from declip.evaluation.datasets.catalogue import Benchmark
from declip.evaluation.datasets.labelled import Labels, Read
from declip.evaluation.datasets.names import class_names, wordnet_ids
from declip.evaluation.datasets.text_files import read_json
from declip.pairs import Data


def read_imagenet(known: Benchmark, folder: Path, split: str) -> Read:
    """A folder for each class by its WordNet id; the class numbers are their places in the sorted ids.

    ImageNet-A and -R have 200 of the classes, which are numbered for themselves, so that scores are among these 200.
    """
    here = folder / split if known.name == "imagenet" else folder
    if not here.is_dir():
        raise InputError(f"{folder} has no folder {split}, so {known.title} has no such split: put its images there.")
    ids = wordnet_ids()
    subset = wordnet_ids(known.name) if known.name in ("imagenet-a", "imagenet-r") else ids
    return _by_folder(here, subset, [ids.index(one) for one in subset])


def read_imagenet_v2(known: Benchmark, folder: Path, split: str) -> Read:
    """Folders 0 to 999, which are the class numbers."""
    ids = [str(number) for number in range(known.classes)]
    return _by_folder(folder, ids, range(known.classes))


def read_objectnet(known: Benchmark, folder: Path, split: str) -> Read:
    """The images of ObjectNet's 113 classes that ImageNet has too (Barbu et al. 2019), with ObjectNet's names for them.

    Which these are, the release says in its ``mappings``.
    """
    mappings = folder / "mappings"
    name_of_folder = read_json(mappings / "folder_to_objectnet_label.json")
    of_imagenet = read_json(mappings / "objectnet_to_imagenet_1k.json")
    kept = sorted(one for one, name in name_of_folder.items() if name in of_imagenet)
    source, of_folder = _folders(folder / "images")
    numbers = {one: number for number, one in enumerate(kept)}
    labels = np.array([numbers.get(one, -1) for one in of_folder], np.int64)
    judged = np.flatnonzero(labels >= 0)
    names = tuple(str(name_of_folder[one]).lower() for one in kept)
    return Read(Subset(source, judged), labels[judged], names)


def _by_folder(folder: Path, ids: Sequence[str], imagenet: Sequence[int]) -> Read:
    """Images in folders of these names; imagenet: the number of each in ImageNet."""
    numbers = {name: number for number, name in enumerate(ids)}
    source, of_folder = _folders(folder)
    for name in dict.fromkeys(of_folder):
        if name not in numbers:
            raise InputError(
                f"{folder / name}: the folder is outside the {len(ids)} classes, which are named {ids[0]} to "
                f"{ids[-1]}: move it away."
            )
    labels: Labels = np.array([numbers[name] for name in of_folder], np.int64)
    names = class_names("imagenet1k")
    return Read(source, labels, tuple(names[i] for i in imagenet))


def _folders(folder: Path) -> tuple[Source, list[str]]:
    """The images in a folder's folders, and the name of the folder that each is in."""
    source: TableSource = open_folder(str(folder), folder, Data(templates=[]), False)
    return source, source.label_column.to_pylist()
