"""Pairs in the rows of Arrow columns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from declip.data.sources.base import BrokenPair, Pair, clean_captions, one_shard, position


@dataclass(frozen=True, slots=True, eq=False)
class TableSource:
    """Pairs in the rows of Arrow columns."""

    name: str
    file: str  # the file that the rows are in, for messages
    folder: Path  # what relative image paths are relative to
    image_column: Any  # of bytes, of paths, or of structs {bytes, path} as Hugging Face datasets write them
    caption_columns: list[Any]  # of strings or lists of strings; none at all for labelled images
    label_column: Any = None
    key_column: Any = None
    line_column: Any = None  # the line that a pair starts in, where the file is a text table
    first: int = 0  # the number of the first row in its file, where these are not all of its rows

    @property
    def shards(self) -> NDArray[np.int64]:
        return one_shard(len(self))

    def __len__(self) -> int:
        return len(self.image_column)

    def __getitem__(self, i: int, /) -> Pair:
        i = position(i, len(self))
        captions = self.captions(i)
        if self.caption_columns and not captions:
            raise BrokenPair(self.key(i), self.where(i), "it has no caption that is not empty")
        label = None if self.label_column is None else _name(self.label_column[i])
        return Pair(self.key(i), self._image(i), captions, label, self.where(i))

    def captions(self, i: int, /) -> tuple[str, ...]:
        i = position(i, len(self))
        values = [_value(column[i]) for column in self.caption_columns]
        return clean_captions(t for value in values for t in (value if isinstance(value, list) else [value]))

    def key(self, i: int, /) -> str:
        i = position(i, len(self))
        key = None if self.key_column is None else _name(self.key_column[i])
        return str(self.first + i) if key is None else key

    def where(self, i: int) -> str:
        """The place of pair i on disk."""
        if self.line_column is None:
            return f"{self.file}, row {self.first + i}"
        return f"{self.file}, line {self.line_column[i].as_py()}"

    def _image(self, i: int) -> bytes:
        try:
            value = self.image_column[i].as_py()
        except UnicodeDecodeError:
            raise BrokenPair(self.key(i), self.where(i), "the path of its image is not UTF-8") from None
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value:
            try:
                value = (self.folder / value).read_bytes()
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise BrokenPair(self.key(i), self.where(i), f"cannot read image {value}: {reason}") from None
        if not value:
            raise BrokenPair(self.key(i), self.where(i), "its image is empty")
        return bytes(value)


def _value(scalar: Any) -> Any:
    """A string, a list of strings or None; bytes in their place where they are not UTF-8."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(scalar.type):
            scalar = scalar.value
        if isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
            values: Any = scalar.values
            return [_value(one) for one in values]
        return scalar.as_buffer().to_pybytes()


def _name(scalar: Any) -> str | None:
    """A key or the name of a class."""
    value = _value(scalar)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else None if value is None else str(value)
