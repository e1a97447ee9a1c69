"""Hugging Face datasets on disk (``save_to_disk``), mapped into memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from declip.data.sources.columns import IMAGE_NAMES, find_columns
from declip.data.sources.table import TableSource, table_of
from declip.errors import InputError, first_line
from declip.pairs import Data


def is_dataset(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def open_dataset(spec: str, folder: Path, data: Data, need_captions: bool) -> TableSource:
    """Open a dataset, or one split of several.

    Raises InputError where the folder holds several splits, rows were chosen or shuffled without being written anew,
    a file cannot be read, or a column is missing.
    """
    if not (folder / "state.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        raise InputError(f"{spec} holds several splits: name one, {' or '.join(str(folder / s) for s in splits)}.")
    state = _json(folder / "state.json")
    if state.get("_indices_files"):
        raise InputError(f"{spec} is a choice of rows of other files: write it with flatten_indices() first.")
    try:
        files = [str(folder / file["filename"]) for file in state["_data_files"]]
        tables = [pa.ipc.open_stream(pa.memory_map(file)).read_all() for file in files]
        rows = pa.concat_tables(tables)
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        raise InputError(f"{spec} cannot be read as a Hugging Face dataset: {first_line(error)}.") from None
    types = dict(zip(rows.schema.names, rows.schema.types, strict=True))
    columns = find_columns(spec, types, data, IMAGE_NAMES, need_captions=need_captions)
    source = table_of(spec, folder, rows, columns)
    names = _class_names(folder, columns.label)
    if names and pa.types.is_integer(source.label_column.type):
        chunks = [
            pa.DictionaryArray.from_arrays(chunk.cast(pa.int32()), pa.array(names))
            for chunk in source.label_column.chunks
        ]
        return replace(source, label_column=pa.chunked_array(chunks))
    return source


def _class_names(folder: Path, label: str | None) -> list[str]:
    """The names of a ClassLabel column's numbers."""
    info = folder / "dataset_info.json"
    feature = _json(info).get("features", {}).get(label, {}) if label and info.is_file() else {}
    names = feature.get("names", []) if isinstance(feature, dict) else []
    return [str(name) for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}.") from None
    return values if isinstance(values, dict) else {}
