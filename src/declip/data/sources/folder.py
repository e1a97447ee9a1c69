"""Image folders: a sub-folder a class."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa

from declip.data.sources.table import TableSource
from declip.errors import InputError
from declip.pairs import Data

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def open_folder(spec: str, folder: Path, data: Data) -> TableSource:
    """Pictures in sub-folders, whose names are the labels; captions are made of them by ``data.templates``.

    Deeper folders belong to the first one. Raises InputError where there are not two sub-folders with pictures,
    or a template has no place for the name.
    """
    for template in data.templates:
        if "{}" not in template:
            raise InputError(f"data.templates: {template!r} has no {{}} where the name of the class goes.")
    files: list[str] = []
    labels: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            inside = sorted(_pictures(Path(entry.path)))
            files += [os.path.relpath(path, folder) for path in inside]
            labels += [entry.name] * len(inside)
    if len(set(labels)) < 2:  # a folder of one is no class, it holds the images of a table that is not there
        raise InputError(
            f"Folder {folder} holds no pairs: put a captions.csv with the columns filename and caption in it, tar or "
            "parquet files, or a sub-folder of pictures for each class."
        )
    label_column = pa.array(labels, pa.string()).dictionary_encode()
    names = [str(label).replace("_", " ").replace("-", " ").strip() for label in label_column.dictionary.to_pylist()]
    captions = [[template.replace("{}", name) for template in data.templates] for name in names]
    file_column = pa.array(files, pa.string())
    return TableSource(
        name=spec,
        file=str(folder),
        folder=folder,
        image_column=file_column,
        caption_columns=[pa.DictionaryArray.from_arrays(label_column.indices, pa.array(captions))],  # once a class
        label_column=label_column,
        key_column=file_column,
    )


def _pictures(folder: Path) -> list[str]:
    return [
        os.path.join(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]
