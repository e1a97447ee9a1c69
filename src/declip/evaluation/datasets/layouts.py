"""Where the files of a benchmark may lie under a folder. Looks at names alone, and imports nothing that takes time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from declip.evaluation.datasets.catalogue import BENCHMARKS, Benchmark


@dataclass(frozen=True, slots=True)
class Found:
    """A benchmark on disk.

    layout: how its files lie, a key of LAYOUTS or one of GENERAL; folder: where; stem: what stands before the split in
    the names of parquet files, where those of several sets lie together.
    """

    name: str
    layout: str
    folder: Path
    stem: str = ""


@dataclass(frozen=True, slots=True)
class Layout:
    """How an archive unpacks.

    folders: what it may be called; marks: what is in it, a folder where it ends in /; alone: the marks are found in no
    other set, so that the folder may have any name; places: where in the folder the marks may lie.
    """

    folders: tuple[str, ...]
    marks: tuple[str, ...]
    alone: bool = True
    places: tuple[str, ...] = ("",)


# The files with captions lie beside the images, or in a folder of their own.
CAPTION_PLACES = ("", "annotations", "karpathy", "karpathy_splits", "Flickr8k_text")

GENERAL = ("webdataset", "huggingface", "parquet", "image-folder")
"""The layouts that any set may have, in the order in which they are looked for."""

_SKETCH = ("sketch", "imagenet-sketch", "ImageNet-Sketch")
_V2 = ("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency", "imagenetv2")
_IMAGENET = ("imagenet", "imagenet1k", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")
_COCO = ("coco", "COCO", "coco2014", "mscoco", "mscoco_captions")

_FLICKR30K = ("flickr30k", "Flickr30k")
_FLICKR8K = ("flickr8k", "Flickr8k")


def _captions(folders: tuple[str, ...], file: str) -> Layout:
    return Layout(folders, (file,), places=CAPTION_PLACES)


LAYOUTS: dict[str, dict[str, Layout]] = {
    "pets": {"pets": Layout(("oxford-iiit-pet",), ("images/", "annotations/test.txt"))},
    "cifar10": {"cifar": Layout(("cifar-10-batches-py",), ("batches.meta", "test_batch"))},
    "cifar100": {"cifar": Layout(("cifar-100-python",), ("meta", "test"))},
    "sun397": {"sun397": Layout(("SUN397",), ("ClassName.txt",))},
    "food101": {"food101": Layout(("food-101",), ("images/", "meta/classes.txt"))},
    "flowers": {"flowers": Layout(("flowers-102",), ("jpg/", "imagelabels.mat", "setid.mat"))},
    "cars": {"cars": Layout(("stanford_cars",), ("devkit/cars_meta.mat",))},
    "caltech101": {"caltech101": Layout(("caltech101", "caltech-101"), ("101_ObjectCategories/",))},
    "aircraft": {"aircraft": Layout(("fgvc-aircraft-2013b",), ("data/variants.txt",))},
    "dtd": {"dtd": Layout(("dtd", "dtd/dtd"), ("images/", "labels/test1.txt"))},
    "imagenet": {
        "imagenet": Layout(_IMAGENET, ("val/n01440764/",)),
        "imagenet-train": Layout(_IMAGENET, ("train/n01440764/",)),
    },
    "imagenet-v2": {"imagenet-v2": Layout(_V2, ("0/", "999/"), alone=False)},
    "imagenet-a": {"imagenet": Layout(("imagenet-a",), ("n01498041/",), alone=False)},
    "imagenet-r": {"imagenet": Layout(("imagenet-r",), ("n01443537/",), alone=False)},
    "imagenet-sketch": {"imagenet": Layout(_SKETCH, ("n01440764/",), alone=False)},
    "objectnet": {"objectnet": Layout(("objectnet-1.0",), ("images/", "mappings/objectnet_to_imagenet_1k.json"))},
    "flickr30k": {
        "karpathy": _captions(_FLICKR30K, "dataset_flickr30k.json"),
        "flickr-lists": _captions(_FLICKR30K, "flickr30k_test_karpathy.txt"),
        "tokens": _captions(_FLICKR30K, "results_20130124.token"),
    },
    "flickr8k": {
        "karpathy": _captions(_FLICKR8K, "dataset_flickr8k.json"),
        "flickr-lists": _captions(_FLICKR8K, "flickr8k_test_karpathy.txt"),
        "tokens": _captions(_FLICKR8K, "Flickr8k.token.txt"),
    },
    "coco": {
        "karpathy": _captions(_COCO, "dataset_coco.json"),
        "coco": _captions(_COCO, "coco_test_karpathy.json"),
    },
}
LAYOUTS["coco-1k"] = LAYOUTS["coco"]


def find(name: str, root: Path) -> Found | None:
    """A benchmark's files under a folder, or in it; None where there are none.

    First the layout of its own archive, then CLIP benchmark's shards, a Hugging Face dataset, parquet files and a
    folder for each split with a folder for each class.
    """
    known = BENCHMARKS[name]
    for layout, about in LAYOUTS[name].items():
        if folder := _own(known, about, root):
            return Found(name, layout, folder)
    own = _folders_of(known, root)
    places = [Found(name, layout, folder) for layout in GENERAL for folder in own]
    if root not in own:
        places.append(Found(name, "parquet", root, f"{name}_"))
    return next((place for place in places if splits_there(place)), None)


def parts_of_split(found: Found, split: str) -> tuple[str, ...] | None:
    """What a split is called in a general layout: its own name, or another that means the same; two that make it up.

    None where it is not there.
    """
    return next(
        (parts for parts in _names(BENCHMARKS[found.name], split) if all(_has_part(found, part) for part in parts)),
        None,
    )


def splits_there(found: Found) -> list[str]:
    """The benchmark's splits that a general layout has."""
    return [split for split in BENCHMARKS[found.name].splits if parts_of_split(found, split)]


def parquet_files(found: Found, part: str) -> list[Path]:
    """The parquet files of a split: ``test.parquet``, ``test-00000-of-00002.parquet``, also in ``data/``."""
    names = (f"{found.stem}{part}.parquet", f"{found.stem}{part}-*.parquet")
    patterns = names if found.stem else (*names, *(f"data/{name}" for name in names))
    return next((files for pattern in patterns if (files := sorted(found.folder.glob(pattern)))), [])


def _has_part(found: Found, part: str) -> bool:
    folder = found.folder / part
    match found.layout:
        case "webdataset":
            return (folder / "nshards.txt").is_file()
        case "huggingface":
            return (folder / "state.json").is_file()
        case "parquet":
            return bool(parquet_files(found, part))
        case _:
            captioned = "retrieval" in BENCHMARKS[found.name].tasks
            return not captioned and folder.is_dir() and any(path.is_dir() for path in folder.iterdir())


def _names(known: Benchmark, split: str) -> list[tuple[str, ...]]:
    names = [split]
    if split == known.test:
        names += ["test", "validation"]
    if split == known.train and "train" not in known.splits:
        names.append("train")
    if split == "val":
        names.append("validation")
    joined = [("train", "val"), ("train", "validation")] if split == "trainval" else []
    return [*((name,) for name in dict.fromkeys(names)), *joined]


def _own(known: Benchmark, layout: Layout, root: Path) -> Path | None:
    """The folder with a layout's marks, where there is one."""
    named = _folders_of(known, root)
    for base in dict.fromkeys([root, *named]):
        for folder in (*(base / name for name in layout.folders), base):
            if folder == root and not layout.alone and root.name not in layout.folders and root not in named:
                continue
            if all(any(_is_there(folder / place, mark) for place in layout.places) for mark in layout.marks):
                return folder
    return None


def _is_there(folder: Path, mark: str) -> bool:
    return (folder / mark).is_dir() if mark.endswith("/") else (folder / mark).is_file()


def _folders_of(known: Benchmark, root: Path) -> list[Path]:
    """Folders under the root that are named as the set is, and the root itself where it is named so."""
    names = [known.name, *known.aliases, known.hub]
    names += [name.replace("-", "_") for name in names]
    unique = dict.fromkeys(name for name in names if name)
    return [*(root / name for name in unique if (root / name).is_dir()), *([root] if root.name in unique else [])]
