"""Pairs in the rows of Arrow columns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from declip.data.sources.base import BrokenPair, Pair, clean_captions, one_shard, position
from declip.data.sources.columns import Columns


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
        label = None if self.label_column is None else self.label_column[i].as_py()
        return Pair(self.key(i), self._image(i), captions, None if label is None else str(label), self.where(i))

    def captions(self, i: int, /) -> tuple[str, ...]:
        i = position(i, len(self))
        values = [column[i].as_py() for column in self.caption_columns]
        return clean_captions(t for value in values for t in ([value] if isinstance(value, str) else value or ()))

    def key(self, i: int, /) -> str:
        i = position(i, len(self))
        key = None if self.key_column is None else self.key_column[i].as_py()
        return str(i if key is None else key)

    def where(self, i: int) -> str:
        """The place of pair i on disk."""
        return f"{self.file}, " + (f"row {i}" if self.line_column is None else f"line {self.line_column[i].as_py()}")

    def _image(self, i: int) -> bytes:
        value = self.image_column[i].as_py()
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


def table_of(name: str, folder: Path, rows: Any, columns: Columns) -> TableSource:
    """The pairs of an Arrow table."""
    return TableSource(
        name=name,
        file=name,
        folder=folder,
        image_column=rows[columns.image],
        caption_columns=[rows[column] for column in columns.captions],
        label_column=rows[columns.label] if columns.label else None,
        key_column=rows[columns.key] if columns.key else None,
    )
