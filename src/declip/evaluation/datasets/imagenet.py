"""ImageNet and the sets that test its classes elsewhere: V2, A, R, Sketch and ObjectNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from declip.data.sources import Source
from declip.data.sources.base import Subset
from declip.data.sources.folder import open_folder
from declip.data.sources.table import TableSource
from declip.errors import InputError, first_line
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

    A class stands for one or several of ImageNet's. What is what, the release says in its ``mappings``.
    """
    mappings = folder / "mappings"
    name_of_folder = read_json(mappings / "folder_to_objectnet_label.json")
    imagenet_names = read_json(mappings / "objectnet_to_imagenet_1k.json")
    number_in_pytorch = {
        str(line): number for number, line in read_json(mappings / "pytorch_to_imagenet_2012_id.json").items()
    }
    try:
        listed = (mappings / "imagenet_to_label_2012_v2").read_text("utf-8").splitlines()
        number_of_name = {name.strip(): int(number_in_pytorch[str(line)]) for line, name in enumerate(listed)}
        stands_for = {
            name: tuple(number_of_name[one.strip()] for one in ones.split(";")) for name, ones in imagenet_names.items()
        }
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{mappings} does not fit together ({first_line(error)}): unpack ObjectNet anew.") from None
    kept = sorted(one for one, name in name_of_folder.items() if name in stands_for)
    source, of_folder = _folders(folder / "images")
    numbers = {one: number for number, one in enumerate(kept)}
    labels = np.array([numbers.get(one, -1) for one in of_folder], np.int64)
    judged = np.flatnonzero(labels >= 0)
    names = [str(name_of_folder[one]) for one in kept]
    return Read(
        Subset(source, judged),
        labels[judged],
        tuple(name.lower() for name in names),
        imagenet=tuple(stands_for[name] for name in names),
    )


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
    return Read(source, labels, tuple(names[i] for i in imagenet), imagenet=tuple((i,) for i in imagenet))


def _folders(folder: Path) -> tuple[Source, list[str]]:
    """The images in a folder's folders, and the name of the folder that each is in."""
    source: TableSource = open_folder(str(folder), folder, Data(templates=[]), False)
    return source, source.label_column.to_pylist()
