"""Reading tables: which columns hold what, and the rows of CSV, TSV and JSONL files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.types as kinds

from declip.errors import InputError
from declip.recipe import Data

TEXT_TABLES = (".csv", ".tsv", ".jsonl")

# The column names looked for, best first. class_name comes before label, which may be its number.
IMAGE_NAMES = ("image", "jpg", "png", "img", "bytes")
FILE_NAMES = ("filename", "file_name", "filepath", "path", "image")
CAPTION_NAMES = ("captions", "caption", "text", "name", "title")
LABEL_NAMES = ("class_name", "label", "class", "category")
KEY_NAMES = ("key", "id", "__key__", "filename")

ColumnTypes = Mapping[str, Any]  # a table's column names with their Arrow types, None in a text table
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of the columns that hold the parts of a pair; captions is empty for labelled images."""

    image: str
    captions: list[str]
    label: str | None
    key: str | None

    @property
    def names(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys(name for name in (self.image, *self.captions, self.label, self.key) if name))


def find_columns(
    file: str, types: ColumnTypes, data: Data, image_names: Sequence[str], *, need_captions: bool
) -> Columns:
    """Find the columns by name and type; the ones told in ``data`` win.

    Raises InputError where a told column does not exist or fit, or there is none of images or (needed) captions.
    """
    listing = ", ".join(name if kind is None else f"{name} ({kind})" for name, kind in types.items())

    def find(role: str, told: str | None, names: Sequence[str], fits: Callable[[Any], bool]) -> str | None:
        if told is None:
            return next((name for name in names if name in types and fits(types[name])), None)
        if told not in types:
            raise InputError(f"{file} has no column {told!r} (data.{role}): its columns are {listing}.")
        if not fits(types[told]):
            raise InputError(f"Column {told!r} of {file} cannot be its data.{role}: it holds {types[told]}.")
        return told

    def missing(what: str, role: str) -> InputError:
        return InputError(f"{file} has no {what}: its columns are {listing}; name the right one, data.{role}=COLUMN.")

    image = find("image", data.image, image_names, _holds_images)
    if image is None:
        raise missing("column of image file names" if image_names is FILE_NAMES else "image column", "image")
    told_captions: Sequence[str | None] = data.captions or [None]
    found = [find("captions", told, CAPTION_NAMES, _holds_texts) for told in told_captions]
    captions = [name for name in found if name]
    if need_captions and not captions:
        raise missing("caption column", "captions")
    label = find("label", data.label, LABEL_NAMES, _holds_names)
    return Columns(image, captions, label, find("key", data.key, KEY_NAMES, _holds_names))


def _is_text(kind: Any) -> bool:
    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    return any(test(kind) for test in (kinds.is_string, kinds.is_large_string, kinds.is_string_view))


def _holds_images(kind: Any) -> bool:
    """Encoded bytes, paths, or structs of them as Hugging Face datasets write them."""
    if kind is None or _is_text(kind):
        return True
    if kinds.is_struct(kind):
        return any(kind.field(i).name in ("bytes", "path") for i in range(kind.num_fields))
    return any(test(kind) for test in (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view))


def _holds_texts(kind: Any) -> bool:
    if kind is None:
        return True
    is_list = any(test(kind) for test in (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list))
    return _is_text(kind.value_type if is_list else kind)


def _holds_names(kind: Any) -> bool:
    return kind is None or _is_text(kind) or bool(kinds.is_integer(kind))


def text_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a CSV, TSV or JSONL file, each with the line that it starts in (the first line is 1).

    Raises InputError where a row cannot be read, UnicodeError and OSError where the file cannot.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from _json_rows(path, file) if path.suffix.lower() == ".jsonl" else _csv_rows(path, file)


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
