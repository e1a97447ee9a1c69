"""Classification sets as their archives unpack, in the folders that torchvision keeps them in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from declip.data.sources.folder import SUFFIXES
from declip.errors import InputError
from declip.evaluation.datasets.catalogue import Benchmark
from declip.evaluation.datasets.labelled import Labels, Read, images_in, spoken
from declip.evaluation.datasets.matlab import read_matlab
from declip.evaluation.datasets.names import class_names
from declip.evaluation.datasets.text_files import read_lines

_PER_CLASS = 30  # of Caltech-101's images that are trained on
_CALTECH_SEED = 0


def read_pets(known: Benchmark, folder: Path, split: str) -> Read:
    """Oxford-IIIT Pets: lines ``Abyssinian_1 1 1 1``, of which the second is the class, counted from 1."""
    file = folder / "annotations" / f"{split}.txt"
    rows = [_parts(file, line, text, 4) for line, text in read_lines(file)]
    labels = np.array([_number(file, row[1]) - 1 for row in rows], np.int64)
    return _listed(file, folder / "images", [f"{row[0]}.jpg" for row in rows], labels, class_names(known.names))


def read_sun397(known: Benchmark, folder: Path, split: str) -> Read:
    """SUN397: lines ``/a/abbey/sun_aaalbzqrimafwbiv.jpg`` in the first partition's lists; all is what folders hold."""
    names = [text for _, text in read_lines(folder / "ClassName.txt")]
    numbers = {name: number for number, name in enumerate(names)}
    if split == "all":
        file = folder / "ClassName.txt"
        paths = [f"{name}/{path.name}" for name in names for path in sorted((folder / name[1:]).glob("sun_*.jpg"))]
    else:
        file = folder / {"train": "Training_01.txt", "test": "Testing_01.txt"}[split]
        if not file.is_file():
            raise InputError(
                f"{file} is missing, so {known.title} has no {split} split: unpack Partitions.zip of {known.source} "
                "into that folder, or judge the split all."
            )
        paths = [text for _, text in read_lines(file)]
    labels = [_known(file, numbers, path.rsplit("/", 1)[0]) for path in paths]
    classes = spoken([name[3:].replace("/", " ") for name in names])
    return _listed(file, folder, [path.lstrip("/") for path in paths], np.array(labels, np.int64), classes)


def read_food101(known: Benchmark, folder: Path, split: str) -> Read:
    """Food-101: lines ``apple_pie/1005649``."""
    names = [text for _, text in read_lines(folder / "meta" / "classes.txt")]
    return _by_folder(folder / "meta" / f"{split}.txt", folder / "images", names, ".jpg")


def read_dtd(known: Benchmark, folder: Path, split: str) -> Read:
    """Describable Textures, its first partition: lines ``banded/banded_0002.jpg``."""
    names = _folders_in(folder / "images")
    files = [folder / "labels" / f"{part}1.txt" for part in _joined(split)]
    return _by_folder(files[0], folder / "images", names, "", *files[1:])


def read_aircraft(known: Benchmark, folder: Path, split: str) -> Read:
    """FGVC Aircraft by variants: lines ``1025794 707-320``."""
    data = folder / "data"
    names = [text for _, text in read_lines(data / "variants.txt")]
    numbers = {name: number for number, name in enumerate(names)}
    file = data / f"images_variant_{split}.txt"
    rows = [text.partition(" ") for _, text in read_lines(file)]
    labels = np.array([_known(file, numbers, name) for _, _, name in rows], np.int64)
    return _listed(file, data / "images", [f"{image}.jpg" for image, _, _ in rows], labels, tuple(names))


def read_flowers(known: Benchmark, folder: Path, split: str) -> Read:
    """Oxford Flowers-102: the numbers of a split's images are in setid.mat, the classes of all in imagelabels.mat."""
    splits = {"train": "trnid", "val": "valid", "test": "tstid"}
    file = folder / "setid.mat"
    ids = read_matlab(file)
    numbers = np.concatenate([_array(file, ids, splits[part]) for part in _joined(split)])
    of_all = _array(folder / "imagelabels.mat", read_matlab(folder / "imagelabels.mat"), "labels")
    if len(numbers) and not 1 <= numbers.min() <= numbers.max() <= len(of_all):
        raise InputError(f"{file} names images that imagelabels.mat has no labels of: get both anew.")
    paths = [f"image_{number:05d}.jpg" for number in numbers]
    return _listed(file, folder / "jpg", paths, of_all[numbers - 1] - 1, class_names(known.names))


def read_cars(known: Benchmark, folder: Path, split: str) -> Read:
    """Stanford Cars: a struct an image, with its file and its class, counted from 1."""
    names = read_matlab(folder / "devkit" / "cars_meta.mat").get("class_names")
    if not isinstance(names, list):
        raise InputError(f"{folder / 'devkit' / 'cars_meta.mat'} has no class_names: get the devkit anew.")
    places = [folder / "devkit" / "cars_train_annos.mat"]
    if split == "test":
        places = [place / "cars_test_annos_withlabels.mat" for place in (folder, folder / "devkit")]
    file = next((place for place in places if place.is_file()), places[0])
    rows = read_matlab(file).get("annotations")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"fname", "class"} <= row.keys() for row in rows
    ):
        raise InputError(f"{file} holds no annotations with fname and class: get the ones with labels.")
    try:
        labels = np.array([int(row["class"][0]) - 1 for row in rows], np.int64)
    except (IndexError, TypeError, ValueError):
        raise InputError(f"{file} has an annotation whose class is no number: get the ones with labels.") from None
    classes = spoken([str(name) for name in names])
    return _listed(file, folder / f"cars_{split}", [str(row["fname"]) for row in rows], labels, classes)


def read_caltech101(known: Benchmark, folder: Path, split: str) -> Read:
    """Caltech-101: a folder a class, of which 30 images drawn with a fixed seed are trained on, the others tested on.

    CLIP's class names are in the order of the folders' names, of which BACKGROUND_Google is the first.
    """
    images = folder / "101_ObjectCategories"
    folders = _folders_in(images)
    names = class_names(known.names)
    if len(folders) != len(names):
        raise InputError(
            f"{images} holds {len(folders)} folders where {known.title} has {len(names)}, BACKGROUND_Google included: "
            "unpack it anew."
        )
    paths: list[str] = []
    labels: list[int] = []
    for number, name in enumerate(folders):
        there = sorted(path.name for path in (images / name).iterdir() if path.suffix.lower() in SUFFIXES)
        order = np.random.default_rng([_CALTECH_SEED, number]).permutation(len(there))
        chosen = {"train": order[:_PER_CLASS], "test": order[_PER_CLASS:], "all": order}[split]
        paths += [f"{name}/{there[i]}" for i in np.sort(chosen)]
        labels += [number] * len(chosen)
    return _listed(images, images, paths, np.array(labels, np.int64), names)


def _by_folder(file: Path, images: Path, names: Sequence[str], suffix: str, *more: Path) -> Read:
    """Lists in which the folder of each image is its class."""
    numbers = {name: number for number, name in enumerate(names)}
    paths = [text.strip() for one in (file, *more) for _, text in read_lines(one)]
    labels = [_known(file, numbers, path.partition("/")[0]) for path in paths]
    return _listed(file, images, [path + suffix for path in paths], np.array(labels, np.int64), spoken(names))


def _listed(file: Path, images: Path, paths: Sequence[str], labels: Labels, classes: tuple[str, ...]) -> Read:
    source = images_in(str(file), str(images), paths, labels=labels, classes=classes)
    return Read(source, labels, classes)


def _folders_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _joined(split: str) -> tuple[str, ...]:
    """The lists that make up a split."""
    return ("train", "val") if split == "trainval" else (split,)


def _parts(file: Path, line: int, text: str, count: int) -> list[str]:
    parts = text.split()
    if len(parts) != count:
        raise InputError(f"{file}, line {line}: it has {len(parts)} parts where {count} are due; unpack it anew.")
    return parts


def _number(file: Path, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{file}: the class {text!r} is no number; unpack the archive anew.") from None


def _known(file: Path, numbers: dict[str, int], name: str) -> int:
    if name not in numbers:
        raise InputError(f"{file}: the label {name!r} is outside the set's {len(numbers)} classes: unpack it anew.")
    return numbers[name]


def _array(file: Path, values: dict[str, Any], name: str) -> Labels:
    found = values.get(name)
    if not isinstance(found, np.ndarray):
        raise InputError(f"{file} has no array {name}: get it anew.")
    return found.astype(np.int64)
