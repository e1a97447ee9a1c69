"""Arrow files and Hugging Face datasets on disk (``save_to_disk``), mapped into memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from declip.data.sources.base import Source, Subset, one_shard
from declip.data.sources.class_labels import ClassNames, names_in_features, names_in_schema
from declip.data.sources.columns import IMAGE_NAMES, find_columns
from declip.data.sources.table import TableSource, table_of
from declip.data.storage import Storage, parent
from declip.errors import InputError, first_line
from declip.pairs import Data

ARROW_FILES = (".arrow", ".feather")


@dataclass(frozen=True, slots=True, eq=False)
class Chosen(Subset):
    """Rows of a dataset in an order of their own, as ``select`` and ``shuffle`` leave them: all in one shard."""

    @property
    def shards(self) -> NDArray[np.int64]:
        return one_shard(len(self.indices))


def is_dataset(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def open_dataset(spec: str, folder: Path, data: Data, need_captions: bool) -> Source:
    """Open a dataset, or one split of several.

    Raises InputError where the folder holds several splits, a file cannot be read, or a column is missing.
    """
    if not (folder / "state.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits") or []
        names = " or ".join(str(folder / str(split)) for split in splits)
        raise InputError(f"{spec} holds several splits: name one, {names}.")
    state = _json(folder / "state.json")
    files = _file_names(folder, state.get("_data_files"))
    if not files:
        raise InputError(f"{spec} cannot be read as a Hugging Face dataset: its state.json names no files.")
    info = folder / "dataset_info.json"
    classes = names_in_features(_json(info).get("features")) if info.is_file() else {}
    rows = _mapped(spec, files, "a Hugging Face dataset")
    table = _source(spec, str(folder), rows, data, need_captions, classes)
    if not (index_files := _file_names(folder, state.get("_indices_files"))):
        return replace(table, opened_by=(open_dataset, (spec, folder, data, need_captions)))
    chosen = _mapped(spec, index_files, "a Hugging Face dataset")
    if chosen.num_columns != 1 or not pa.types.is_integer(chosen.schema.types[0]):
        raise InputError(f"{spec} cannot be read as a Hugging Face dataset: its file of indices holds none.")
    indices = np.asarray(chosen.column(0)).astype(np.int64)
    if len(indices) and not 0 <= indices.min() <= indices.max() < len(table):
        raise InputError(f"{spec} cannot be read as a Hugging Face dataset: it chooses rows that are not there.")
    return Chosen(table, indices)


def open_arrow(spec: str, path: str, data: Data, need_captions: bool) -> TableSource:
    """Open an .arrow or .feather file, of the stream or the file format. Raises InputError as ``open_dataset``."""
    rows = _mapped(spec, [Storage.of(data).local(path)], "an Arrow file")
    table = _source(spec, parent(path), rows, data, need_captions, names_in_schema(rows.schema.metadata))
    return replace(table, opened_by=(open_arrow, (spec, path, data, need_captions)))


def _mapped(spec: str, files: Sequence[Path], what: str) -> pa.Table:
    """The rows of Arrow files, mapped into memory."""
    tables = []
    try:
        for file in files:
            source = pa.memory_map(str(file))
            is_stream = source.read(6) != b"ARROW1"
            source.seek(0)
            reader = pa.ipc.open_stream(source) if is_stream else pa.ipc.open_file(source)
            tables.append(reader.read_all())
        rows = pa.concat_tables(tables)
        rows.validate()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{spec} cannot be read as {what}: {first_line(error)}.") from None
    return rows


def _source(
    spec: str, folder: str, rows: pa.Table, data: Data, need_captions: bool, classes: ClassNames
) -> TableSource:
    types = dict(zip(rows.schema.names, rows.schema.types, strict=True))
    columns = find_columns(spec, types, data, IMAGE_NAMES, need_captions=need_captions)
    return table_of(spec, folder, Storage.of(data), need_captions, columns, rows, rows[columns.image], classes)


def _file_names(folder: Path, files: object) -> list[Path]:
    """The files that a state.json lists."""
    if not isinstance(files, list):
        return []
    return [folder / str(file["filename"]) for file in files if isinstance(file, dict) and "filename" in file]


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}.") from None
    return values if isinstance(values, dict) else {}
