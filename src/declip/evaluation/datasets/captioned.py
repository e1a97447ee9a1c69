"""Retrieval sets: COCO and Flickr with Karpathy's splits (Karpathy and Fei-Fei 2015), in the files people have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from declip.errors import InputError, first_line
from declip.evaluation.datasets.catalogue import Benchmark
from declip.evaluation.datasets.labelled import Read, images_in
from declip.evaluation.datasets.layouts import CAPTION_PLACES
from declip.evaluation.datasets.text_files import read_json, read_lines

# Where the images of a set may lie, relative to its folder.
_IMAGE_FOLDERS = {
    "flickr30k": ("", "images", "Images", "flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images"),
    "flickr8k": ("", "images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset"),
    "coco": ("", "images"),
}

Captioned = dict[str, list[str]]  # the captions of each image file, in the order of the split


def read_karpathy(known: Benchmark, folder: Path, split: str) -> Read:
    """Karpathy's dataset_coco.json, dataset_flickr30k.json and dataset_flickr8k.json, with all splits in one."""
    kind = _kind(known)
    file = _file(folder, f"dataset_{kind}.json")
    images = _list(file, read_json(file), "images")
    captions: Captioned = {}
    for image in images:
        if _text(file, image, "split") != split:
            continue
        path = _text(file, image, "filename")
        if "filepath" in image:
            path = f"{_text(file, image, 'filepath')}/{path}"
        captions[path] = [_text(file, sentence, "raw") for sentence in _list(file, image, "sentences")]
    return _read(file, folder, kind, split, captions)


def read_coco(known: Benchmark, folder: Path, split: str) -> Read:
    """COCO's own format of captions, as CLIP benchmark has Karpathy's splits in: coco_test_karpathy.json.

    Images come in the order of their ids, as there.
    """
    file = _file(folder, f"coco_{split}_karpathy.json")
    content = read_json(file)
    year = "train2014" if split == "train" else "val2014"
    try:
        named = {int(image["id"]): _text(file, image, "file_name") for image in _list(file, content, "images")}
        names = {number: name if "/" in name else f"{year}/{name}" for number, name in named.items()}
        captions: Captioned = {names[number]: [] for number in sorted(names)}
        for annotation in _list(file, content, "annotations"):
            captions[names[annotation["image_id"]]].append(_text(file, annotation, "caption"))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: an image or caption has no fitting id ({first_line(error)}): get it anew.") from None
    return _read(file, folder, "coco", split, captions)


def read_flickr_lists(known: Benchmark, folder: Path, split: str) -> Read:
    """CLIP benchmark's flickr30k_test_karpathy.txt: a header, then lines ``36979.jpg,A group of friends …``."""
    file = _file(folder, f"{known.name}_{split}_karpathy.txt")
    captions: Captioned = {}
    for number, text in read_lines(file)[1:]:
        image, comma, caption = text.partition(".jpg,")
        if not comma:
            raise InputError(f"{file}, line {number}: write the image's file name, a comma and a caption.")
        captions.setdefault(f"{image}.jpg", []).append(caption)
    return _read(file, folder, known.name, split, captions)


def read_tokens(known: Benchmark, folder: Path, split: str) -> Read:
    """The sets' own files: lines ``1000092795.jpg#0<tab>Two young guys …``, and a list of the images of each split."""
    file = _file(folder, "results_20130124.token", "Flickr8k.token.txt")
    of_dev = "dev" if split == "val" else split
    chosen = _file(folder, f"Flickr_8k.{of_dev}Images.txt", f"{known.name}_{split}.txt", f"{split}.txt")
    captions: Captioned = {}
    for _, name in read_lines(chosen):
        captions[name if name.endswith(".jpg") else f"{name}.jpg"] = []
    for number, text in read_lines(file):
        name, tab, caption = text.partition("\t")
        image, mark, _ = name.rpartition("#")
        if not (tab and mark):
            raise InputError(f"{file}, line {number}: write the image's file name, #, a number, a tab and a caption.")
        if image in captions:
            captions[image].append(caption)
    return _read(chosen, folder, known.name, split, captions)


def _kind(known: Benchmark) -> str:
    return "coco" if known.name.startswith("coco") else known.name


def _read(file: Path, folder: Path, kind: str, split: str, captions: Captioned) -> Read:
    if not captions:
        raise InputError(f"{file} names no images of the split {split}: get it anew, or choose another split.")
    if wordless := next((image for image, texts in captions.items() if not any(text.strip() for text in texts)), None):
        raise InputError(f"{file} has no caption of {wordless}: get it anew.")
    images = _where(folder, kind, next(iter(captions)))
    return Read(images_in(str(file), str(images), list(captions), captions=list(captions.values())))


def _where(folder: Path, kind: str, image: str) -> Path:
    """The folder that the images are in. Raises InputError where the first one is in none."""
    places = [folder / place for place in _IMAGE_FOLDERS[kind]]
    found = next((place for place in places if (place / image).is_file()), None)
    if found is None:
        tried = ", ".join(str(place) for place in places)
        raise InputError(f"The image {image} is in none of {tried}: put the images into one of these.")
    return found


def _file(folder: Path, *names: str) -> Path:
    """The first of these files that is there. Raises InputError where none is."""
    places = [folder / place / name for name in names for place in CAPTION_PLACES]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError(f"{folder} has no {' or '.join(names)}, so it has no such split: put the file there.")
    return found


def _list(file: Path, values: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = values.get(name)
    if not (isinstance(found, list) and all(isinstance(one, dict) for one in found)):
        raise InputError(f"{file} has no list of {name} where one is due: get it anew.")
    return found


def _text(file: Path, values: dict[str, Any], name: str) -> str:
    found = values.get(name)
    if not isinstance(found, str):
        raise InputError(f"{file} has no text {name!r} where one is due: get it anew.")
    return found
