"""Tiny benchmarks in the layouts of the real archives: the names, lists and pickles as they unpack, with few images."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image

from declip.evaluation.datasets.names import class_names

FOODS = [f"food_{number:03d}" for number in range(101)]
VARIANTS = [f"A{number}/B" if number == 7 else f"A {number}" for number in range(100)]
CARS = [f"Maker Model {number} 2012" for number in range(196)]
TEXTURES = [f"texture{number:02d}" for number in range(47)]
SCENES = [f"/a/scene_{number:03d}/indoor" if number % 2 else f"/a/scene_{number:03d}" for number in range(397)]


def pixels(seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, 20, 24)).save(path, "JPEG")


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def rgb(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def pets(root: Path) -> None:
    """Oxford-IIIT Pets: names and lines of the real lists; the columns are image, class, species and breed."""
    breeds = [name.replace(" ", "_") for name in class_names("pets")]
    for split, first in (("trainval", 1), ("test", 101)):
        rows = [(f"{breed}_{first}", number) for number, breed in enumerate(breeds, 1)]
        write_lines(root / "oxford-iiit-pet/annotations" / f"{split}.txt", [f"{name} {n} 1 1" for name, n in rows])
        for name, number in rows:
            write_image(root / "oxford-iiit-pet/images" / f"{name}.jpg", number + first)


def _pickle(path: Path, values: dict[str, Any]) -> None:
    """As Python 2 wrote CIFAR's: protocol 2, whose strings a Python 3 program reads as bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(values, protocol=2))


def cifar(root: Path, classes: int) -> None:
    coarse = classes == 100
    folder = root / ("cifar-100-python" if coarse else "cifar-10-batches-py")
    names = [f"kind_{number}" for number in range(classes)]
    labels = "fine_labels" if coarse else "labels"
    files = ["train", "test"] if coarse else [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    _pickle(folder / ("meta" if coarse else "batches.meta"), {"fine_label_names" if coarse else "label_names": names})
    for number, file in enumerate(files):
        rows = np.stack([pixels(10 * number + i).transpose(2, 0, 1).reshape(-1) for i in range(4)])
        _pickle(folder / file, {"data": rows, labels: [3, 1, classes - 1, number], "batch_label": "some"})


def food101(root: Path) -> None:
    write_lines(root / "food-101/meta/classes.txt", FOODS)
    for split, first in (("train", 0), ("test", 50)):
        chosen = {food: [f"{food}/{first + i}" for i in range(2)] for food in FOODS[:3]}
        write_lines(root / "food-101/meta" / f"{split}.txt", [path for paths in chosen.values() for path in paths])
        listed = {food: chosen.get(food, []) for food in FOODS}
        (root / "food-101/meta" / f"{split}.json").write_text(json.dumps(listed))
        for number, path in enumerate(path for paths in chosen.values() for path in paths):
            write_image(root / "food-101/images" / f"{path}.jpg", first + number)


def flowers(root: Path) -> None:
    """Flowers-102: imagelabels.mat has a class, from 1, for each image, setid.mat the images of the splits."""
    folder = root / "flowers-102"
    for number in range(1, 13):
        write_image(folder / "jpg" / f"image_{number:05d}.jpg", number)
    labels = np.array([[77, 77, 1, 102, 5, 5, 6, 7, 8, 9, 10, 11]], np.uint8)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": labels}, do_compression=True)
    ids = {"trnid": [[3, 1, 9]], "valid": [[2, 4, 10]], "tstid": [[12, 5, 6, 7, 8, 11]]}
    scipy.io.savemat(folder / "setid.mat", {name: np.array(of, np.uint16) for name, of in ids.items()})


def cars(root: Path) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    scipy.io.savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array([CARS], object)})
    kind = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = [(39, 116, 569, 375, label, f"{i + 1:05d}.jpg") for i, label in enumerate([196, 1, 14])]
        scipy.io.savemat(folder / file, {"annotations": np.array([rows], kind)}, do_compression=split == "train")
        for i in range(3):
            write_image(folder / f"cars_{split}" / f"{i + 1:05d}.jpg", i)


def aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b/data"
    write_lines(data / "variants.txt", VARIANTS)
    for first, split in enumerate(("train", "val", "trainval", "test")):
        images = [f"{1000000 + 10 * first + i}" for i in range(3)]
        labels = [VARIANTS[i] for i in (7, 0, 99)]
        write_lines(data / f"images_variant_{split}.txt", [" ".join(row) for row in zip(images, labels, strict=True)])
        for image in images:
            write_image(data / "images" / f"{image}.jpg", int(image))


def dtd(root: Path) -> None:
    """As torchvision unpacks it, in dtd/dtd."""
    folder = root / "dtd/dtd"
    for first, split in enumerate(("train", "val", "test")):
        paths = [f"{name}/{name}_{first:04d}.jpg" for name in TEXTURES]
        write_lines(folder / "labels" / f"{split}1.txt", paths)
        for number, path in enumerate(paths):
            write_image(folder / "images" / path, 50 * first + number)


def sun397(root: Path) -> None:
    write_lines(root / "SUN397/ClassName.txt", SCENES)
    for split, first in (("Training", 0), ("Testing", 10)):
        paths = [f"{scene}/sun_{chr(97 + first)}{i}.jpg" for scene in SCENES[:3] for i in range(2)]
        write_lines(root / "SUN397" / f"{split}_01.txt", paths)
        for number, path in enumerate(paths):
            write_image(root / f"SUN397{path}", first + number)


def caltech101(root: Path, background: bool = True) -> None:
    """Folders of 32 images in each of the first three classes, and of one in all others."""
    folder = root / "caltech101/101_ObjectCategories"
    names = ["BACKGROUND_Google", "Faces", "Faces_easy", "Leopards", "Motorbikes"]
    names += [name.replace(" ", "_") for name in class_names("caltech101")[5:]]
    for number, name in enumerate(names if background else names[1:]):
        for i in range(1, 33 if number < 3 else 2):
            write_image(folder / name / f"image_{i:04d}.jpg", number)


def by_class(folder: Path, classes: Sequence[str], images: int = 2) -> None:
    for number, name in enumerate(classes):
        for i in range(images):
            write_image(folder / name / f"{i}.JPEG", 10 * number + i)


def rgb_of(image: Image.Image) -> list[Any]:
    return np.asarray(image.convert("RGB")).tolist()
