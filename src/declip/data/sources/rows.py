"""The rows of CSV, TSV and JSON lines files, each with its line."""

from __future__ import annotations

import csv
import json
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from declip.errors import InputError

JSON_LINES = (".jsonl", ".ndjson", ".json")  # DeCLIP's lists of YFCC15M are JSON lines, and named .json
TEXT_TABLES = (".csv", ".tsv", *JSON_LINES)
_LONGEST_FIELD = 2**24  # a quote that is never closed must not read a whole large file into one field

Row = dict[str, Any]


def text_rows(path: Path, name: str) -> Generator[tuple[int, Row], None, None]:
    """The rows of a CSV, TSV or JSONL file, each with the line that it starts in (the first line is 1).

    name: of the file, as messages say it. Raises InputError where a row cannot be read, UnicodeError and OSError where
    the file cannot.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from _json_rows(name, file) if name.lower().endswith(JSON_LINES) else _csv_rows(name, file)


def _json_rows(name: str, file: Iterable[str]) -> Iterator[tuple[int, Row]]:
    array = name.lower().endswith(".json")  # the name that a whole array would have, too
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        if array and text.lstrip().startswith("["):
            raise InputError(
                f"{name}, line {line} begins a JSON array: write one JSON object a line, as jq -c '.[]' does."
            )
        array = False
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
            raise InputError(f"{name}, line {line} is not valid JSON: {error}.") from None
        if not isinstance(row, dict):
            raise InputError(f'{name}, line {line} is no JSON object: write {{"filename": …, "caption": …}}.')
        yield line, row


def _csv_rows(name: str, file: Iterable[str]) -> Iterator[tuple[int, Row]]:
    if csv.field_size_limit() < _LONGEST_FIELD:
        csv.field_size_limit(_LONGEST_FIELD)  # the module's own limit is 128 KB
    # strict: a stray quote is an error, where it would otherwise swallow the rows that follow
    reader = csv.reader(file, delimiter="\t" if name.lower().endswith(".tsv") else ",", strict=True)
    header: list[str] = []
    line = 1
    try:
        for fields in reader:
            if fields and not header:
                header = [field.strip() for field in fields]
            elif fields and len(fields) != len(header):
                raise InputError(
                    f"{name}, line {line} has {len(fields)} fields where the header has {len(header)}: "
                    'put a caption that holds the separator in double quotes ("…").'
                )
            elif fields:
                yield line, dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f'{name}, line {line} cannot be read: {error}; inside a quoted field, a quote is written twice ("").'
        ) from None
