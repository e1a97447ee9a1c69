"""Which columns of a table hold what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.types as kinds

from declip.errors import InputError
from declip.pairs import Data

# The column names looked for, best first. class_name comes before label, which may be its number.
IMAGE_NAMES = ("image", "jpg", "png", "img", "bytes")
FILE_NAMES = ("filename", "file_name", "filepath", "path", "image")
CAPTION_NAMES = ("captions", "caption", "text", "name", "title")
LABEL_NAMES = ("class_name", "label", "class", "category", "fine_label")
KEY_NAMES = ("key", "id", "__key__", "filename")

ColumnTypes = Mapping[str, Any]  # a table's column names with their Arrow types, None in a text table


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


def is_list(kind: Any) -> bool:
    """Lists of any length or of one."""
    return any(test(kind) for test in (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list))


def is_text(kind: Any) -> bool:
    """Strings, also of a dictionary."""
    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    return any(test(kind) for test in (kinds.is_string, kinds.is_large_string, kinds.is_string_view))


def _holds_images(kind: Any) -> bool:
    """Encoded bytes, paths, or structs of them as Hugging Face datasets write them."""
    if kind is None or is_text(kind):
        return True
    if kinds.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return any((f.name == "bytes" and _is_bytes(f.type)) or (f.name == "path" and is_text(f.type)) for f in fields)
    return _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    return any(test(kind) for test in (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view))


def _holds_texts(kind: Any) -> bool:
    if kind is None:
        return True
    return is_text(kind.value_type if is_list(kind) else kind)


def _holds_names(kind: Any) -> bool:
    return kind is None or is_text(kind) or bool(kinds.is_integer(kind))
