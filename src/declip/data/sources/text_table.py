"""Caption tables beside images: CSV, TSV and JSONL files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from declip.data.sources.columns import FILE_NAMES, Columns, find_columns
from declip.data.sources.table import TableSource
from declip.errors import InputError
from declip.pairs import Data

JSON_LINES = (".jsonl", ".ndjson", ".json")  # DeCLIP's lists of YFCC15M are JSON lines, and named .json
TEXT_TABLES = (".csv", ".tsv", *JSON_LINES)

Row = dict[str, Any]


def open_text_table(spec: str, path: Path, data: Data, need_captions: bool) -> TableSource:
    """Group the rows of a text table by file name; the label and key of a pair are those of its first row."""
    captions: dict[str, list[str]] = {}
    labels: list[str | None] = []
    keys: list[str] = []
    lines: list[int] = []
    columns: Columns | None = None
    try:
        for line, row in text_rows(path):
            if columns is None:
                columns = find_columns(str(path), dict.fromkeys(row), data, FILE_NAMES, need_captions=need_captions)
            filename = row.get(columns.image)
            if not isinstance(filename, str) or not (filename := filename.strip()):
                raise InputError(f"{path}, line {line}: there is no file name in column {columns.image}.")
            if filename not in captions:
                captions[filename] = []
                labels.append(_text(row.get(columns.label)) if columns.label else None)
                keys.append((_text(row.get(columns.key)) if columns.key else None) or filename)
                lines.append(line)
            for name in columns.captions:
                captions[filename] += _texts(row.get(name), f"{path}, line {line}, column {name}")
        text_columns = [pa.array(list(captions.values()), pa.list_(pa.string()))]
        return TableSource(
            name=spec,
            file=str(path),
            folder=Path(data.image_root).expanduser() if data.image_root else path.parent,
            image_column=pa.array(list(captions), pa.string()),
            caption_columns=text_columns if columns and columns.captions else [],
            label_column=pa.array(labels, pa.string()),
            key_column=pa.array(keys, pa.string()),
            line_column=pa.array(lines, pa.int64()),
        )
    except (UnicodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}.") from None


def _text(value: object) -> str | None:
    """A label or key as text; None where there is none."""
    return None if value is None else str(value).strip() or None


def _texts(value: object, where: str) -> list[str]:
    texts: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: a caption must be a text or a list of texts, not {value!r}.")
    return texts


def text_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a CSV, TSV or JSONL file, each with the line that it starts in (the first line is 1).

    Raises InputError where a row cannot be read, UnicodeError and OSError where the file cannot.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from _json_rows(path, file) if path.suffix.lower() in JSON_LINES else _csv_rows(path, file)


def _json_rows(path: Path, file: Iterable[str]) -> Iterator[tuple[int, Row]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {line} is not valid JSON: {error}.") from None
        if not isinstance(row, dict):
            raise InputError(f'{path}, line {line} is no JSON object: write {{"filename": …, "caption": …}}.')
        yield line, row


def _csv_rows(path: Path, file: Iterable[str]) -> Iterator[tuple[int, Row]]:
    # strict: a stray quote is an error, where it would otherwise swallow the rows that follow
    reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    header: list[str] = []
    line = 1
    try:
        for fields in reader:
            if fields and not header:
                header = [field.strip() for field in fields]
            elif fields and len(fields) != len(header):
                raise InputError(
                    f"{path}, line {line} has {len(fields)} fields where the header has {len(header)}: "
                    'put a caption that holds the separator in double quotes ("…").'
                )
            elif fields:
                yield line, dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f'{path}, line {line} cannot be read: {error}; inside a quoted field, a quote is written twice ("").'
        ) from None
