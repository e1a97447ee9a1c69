"""Caption tables beside images: CSV, TSV and JSONL files.

A small table is read into memory. Of a large one an index is made once, an Arrow file beside it that is mapped into
memory, so that loader processes share it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pyarrow as pa

from declip.data.sources.base import LONGEST_CAPTION
from declip.data.sources.columns import FILE_NAMES, Columns, find_columns
from declip.data.sources.grouping import SCHEMA, Numbers, grouped, name_hash
from declip.data.sources.index_files import index_facts, write_index
from declip.data.sources.rows import Row, text_rows
from declip.data.sources.table import TableSource
from declip.data.storage import Storage, parent
from declip.errors import InputError
from declip.pairs import Data

SMALL = 2**22
"""Bytes of a table that needs no index."""

_FORMAT = "1"
_ROWS, _CHARACTERS = 2**16, 2**26  # of a batch, whichever comes first
_SAID_EVERY = 2.0  # seconds


def open_text_table(name: str, path: str, data: Data, need_captions: bool) -> TableSource:
    """Open a text table: rows of the same file name are one pair, its label and key are those of the first.

    A row is known by its line in the file. Raises InputError where a row or the file cannot be read, a column is
    missing, or the index can be written nowhere.
    """
    storage = Storage.of(data)
    file = storage.local(path)
    try:
        with closing(text_rows(file, path)) as rows:
            first = next(rows, None)
        columns = None
        table = SCHEMA.empty_table()
        if first is not None:
            columns = find_columns(path, dict.fromkeys(first[1]), data, FILE_NAMES, need_captions=need_captions)
            small = file.stat().st_size <= SMALL
            table = _in_memory(file, path, columns) if small else _indexed(file, path, columns, storage)
    except (UnicodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}; save it as UTF-8.") from None
    named_by_file = columns is None or columns.key in (None, columns.image)
    return TableSource(
        name=name,
        file=path,
        folder=os.path.expanduser(data.image_root or parent(path)),
        storage=storage,
        need_captions=need_captions,
        image_column=table["image"],
        caption_columns=[table["captions"]] if columns and columns.captions else [],
        label_column=table["label"],
        key_column=table["image" if named_by_file else "key"],
        line_column=table["line"],
        opened_by=(open_text_table, (name, path, data, need_captions)),
    )


def _in_memory(file: Path, path: str, columns: Columns) -> pa.Table:
    read = list(_batches(file, path, columns))
    batches = [batch for batch, _ in read]
    merged = grouped(batches, np.concatenate([hashes for _, hashes in read]))
    return pa.Table.from_batches(batches if merged is None else merged, SCHEMA)


def _indexed(file: Path, path: str, columns: Columns, storage: Storage) -> pa.Table:
    """The table's index, mapped into memory; made first where there is none, or one of a table that has changed."""
    facts = {"format": _FORMAT, "table": storage.version(path), "columns": asdict(columns)}
    places = storage.index_places(path)
    index = next((place for place in places if index_facts(place) == facts), None)
    if index is None:
        index = write_index(path, places, lambda temporary: _write(file, path, columns, facts, temporary))
    return pa.ipc.open_file(pa.memory_map(str(index))).read_all()


def _write(file: Path, path: str, columns: Columns, facts: dict[str, Any], index: Path) -> None:
    schema = SCHEMA.with_metadata({"declip": json.dumps(facts)})
    hashes: list[Numbers] = []
    with pa.OSFile(str(index), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch, of_names in _batches(file, path, columns):
            writer.write_batch(batch)
            hashes.append(of_names)
    with pa.memory_map(str(index)) as mapped:
        reader = pa.ipc.open_file(mapped)
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        merged = grouped(batches, np.concatenate(hashes))
        if merged is None:  # each name is there once: what was written is the index
            return
        again = index.with_name(index.name + ".merged")
        try:
            with pa.OSFile(str(again), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for batch in merged:
                    writer.write_batch(batch)
            again.replace(index)
        finally:
            again.unlink(missing_ok=True)


def _batches(file: Path, path: str, columns: Columns) -> Iterator[tuple[pa.RecordBatch, Numbers]]:
    """The rows in batches of SCHEMA, each with the hashes of its file names [rows]."""
    rows: list[tuple[str, list[str], str | None, str, int]] = []
    characters = count = 0
    said = monotonic()
    for line, row in text_rows(file, path):
        filename = row.get(columns.image)
        if not isinstance(filename, str) or not (filename := filename.strip()):
            raise InputError(f"{path}, line {line}: there is no file name in column {columns.image}.")
        captions = _captions(row, columns.captions, path, line)
        label = _text(row.get(columns.label)) if columns.label else None
        key = (_text(row.get(columns.key)) if columns.key else None) or filename
        rows.append((filename, captions, label, key, line))
        characters += sum(map(len, captions))
        if len(rows) >= _ROWS or characters >= _CHARACTERS:
            yield _batch(rows)
            count += len(rows)
            rows, characters = [], 0
            if monotonic() - said > _SAID_EVERY and sys.stderr.isatty():
                print(f"Indexing {path}: {count:,} rows …", file=sys.stderr)
                said = monotonic()
    if rows:
        yield _batch(rows)


def _batch(rows: Sequence[tuple[str, list[str], str | None, str, int]]) -> tuple[pa.RecordBatch, Numbers]:
    columns = list(zip(*rows, strict=True))
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    hashes = np.fromiter((name_hash(name, 0) for name in columns[0]), np.int64, len(rows))
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA), hashes


def _text(value: object) -> str | None:
    """A label or key as text; None where there is none."""
    return None if value is None else str(value).strip() or None


def _captions(row: Row, names: Sequence[str], path: str, line: int) -> list[str]:
    """All captions of a row, each no longer than what is read of it."""
    captions: list[str] = []
    for name in names:
        value = row.get(name)
        texts: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
        for text in texts:
            if not isinstance(text, str):
                raise InputError(
                    f"{path}, line {line}, column {name}: a caption must be a text or a list of texts, not {value!r}."
                )
            captions.append(text[: 2 * LONGEST_CAPTION])
    return captions
