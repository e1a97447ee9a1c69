"""Image folders: a sub-folder a class, or pictures with their captions in text files beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from declip.data.sources.base import clean_captions
from declip.data.sources.table import TableSource
from declip.data.storage import Storage
from declip.errors import InputError, first_line
from declip.pairs import Data

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def open_folder(spec: str, folder: Path, data: Data, need_captions: bool) -> TableSource:
    """Pictures with a text file of the same name beside each, a caption a line; then pictures in sub-folders.

    The names of sub-folders are the labels; captions are made of them by ``data.templates``. Deeper folders belong to
    the first one. Raises InputError where there are neither text files nor two sub-folders with pictures, a name is no
    UTF-8, a file cannot be read, or a template has no place for the name.
    """
    for template in data.templates:
        if "{}" not in template:
            raise InputError(f"data.templates: {template!r} has no {{}} where the name of the class goes.")
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        files, captions = _beside_texts(folder, [entry.name for entry in entries])
        classes = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        pictures = [(name, pa.array(sorted(_pictures(folder, name)), pa.string())) for name in classes]
    except UnicodeEncodeError as error:
        raise InputError(f"A file in {folder} has a name that is no UTF-8, {error.object!r}: rename it.") from None
    except OSError as error:
        raise InputError(f"Folder {folder} cannot be read: {first_line(error)}.") from None
    pictures = [(name, inside) for name, inside in pictures if len(inside)]
    if not len(files) and len(pictures) < 2:  # a folder of one is no class, it holds the images of a missing table
        raise InputError(
            f"Folder {folder} holds no pairs: put a captions.csv with the columns filename and caption in it, tar or "
            "parquet files, a sub-folder of pictures for each class, or a .txt file of captions beside each picture."
        )
    if pictures and need_captions and not data.templates:
        raise InputError(f"The classes of {folder} need captions: say data.templates='a photo of a {{}}.'.")
    paths = pa.chunked_array([files, *(inside for _, inside in pictures)])
    return TableSource(
        name=spec,
        file=str(folder),
        folder=str(folder),
        storage=Storage.of(data),
        need_captions=need_captions,
        image_column=paths,
        caption_columns=[
            pa.chunked_array([captions, *(_repeated(_made_of(name, data), len(inside)) for name, inside in pictures)])
        ]
        if len(files) or data.templates
        else [],
        label_column=pa.chunked_array(
            [
                pa.nulls(len(files), pa.dictionary(pa.int32(), pa.string())),
                *(_repeated(pa.array([name]), len(inside)) for name, inside in pictures),
            ]
        ),
        key_column=paths,
    )


def _made_of(label: str, data: Data) -> Any:
    """The captions of a class: one list."""
    name = label.replace("_", " ").replace("-", " ").strip()
    return pa.array([[template.replace("{}", name) for template in data.templates]], pa.list_(pa.string()))


def _repeated(value: Any, count: int) -> Any:
    """The same value over and over, held once: a dictionary column."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32), pa.int32()), value)


def _beside_texts(folder: Path, names: list[str]) -> tuple[Any, Any]:
    """The pictures of a folder where any has a text file beside it, and the captions of each."""
    there = set(names)
    pictures = [name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    texts = [os.path.splitext(name)[0] + ".txt" for name in pictures]
    if there.isdisjoint(texts):
        pictures, texts = [], []
    lists = [clean_captions((folder / text).read_bytes().splitlines()) if text in there else () for text in texts]
    numbers = pa.array(range(len(lists)), pa.int32())
    captions = pa.DictionaryArray.from_arrays(numbers, pa.array(lists, pa.list_(pa.string())))
    return pa.array(pictures, pa.string()), captions


def _pictures(folder: Path, name: str) -> Iterator[str]:
    """The paths of the pictures in a sub-folder, as they are seen from the folder."""
    for place, _, names in os.walk(folder / name, onerror=_raise):
        beginning = os.path.relpath(place, folder)
        for file in names:
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                yield f"{beginning}{os.sep}{file}"


def _raise(error: OSError) -> None:
    raise error  # os.walk would pass over a folder that cannot be read
