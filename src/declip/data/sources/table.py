"""Pairs in the rows of Arrow columns."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.types as kinds
from numpy.typing import NDArray

from declip.data.sources.base import BrokenPair, Pair, clean_captions, one_shard, position
from declip.data.sources.class_labels import ClassNames, with_names
from declip.data.sources.columns import Columns, is_list, is_text
from declip.data.storage import Storage, is_remote, join


def plain(scalar: Any) -> Any:
    """What an Arrow scalar holds; a text in it that is no UTF-8 comes as bytes."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if kinds.is_dictionary(scalar.type):
            return plain(scalar.value)
        if kinds.is_struct(scalar.type):
            return {scalar.type.field(i).name: plain(scalar[i]) for i in range(scalar.type.num_fields)}
        if is_list(scalar.type):
            return [plain(value) for value in scalar.values]
        return scalar.as_buffer().to_pybytes()


def _name(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


@dataclass(frozen=True, slots=True, eq=False)
class TableSource:
    """Pairs in the rows of Arrow columns."""

    name: str
    file: str  # the file that the rows are in, for messages
    folder: str  # what relative image paths are relative to; may be a URL
    storage: Storage
    need_captions: bool  # a label alone will not do
    image_column: Any  # of bytes, of paths, or of structs {bytes, path} as Hugging Face datasets write them
    caption_columns: list[Any]  # of strings or lists of strings; none at all for labelled images
    label_column: Any = None
    key_column: Any = None
    line_column: Any = None  # the line that a pair starts in, where the file is a text table
    first: int = 0  # the number of the first row in its file, where these are not all of its rows
    opened_by: tuple[Callable[..., Any], tuple[Any, ...]] | None = None  # how to open it again, where it is mapped

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled, a mapped file is not copied but opened again."""
        return self.opened_by or object.__reduce_ex__(self, protocol)

    @property
    def named(self) -> bool:
        return self.key_column is not None

    @property
    def shards(self) -> NDArray[np.int64]:
        return one_shard(len(self))

    def __len__(self) -> int:
        return len(self.image_column)

    def __getitem__(self, i: int, /) -> Pair:
        i = position(i, len(self))
        captions = self.captions(i)
        label = self.label(i)
        if self.caption_columns and not captions and (self.need_captions or label is None):
            raise BrokenPair(self.key(i), self.where(i), "it has no caption that is not empty")
        return Pair(self.key(i), self._image(i), captions, label, self.where(i))

    def captions(self, i: int, /) -> tuple[str, ...]:
        i = position(i, len(self))
        values = [plain(column[i]) for column in self.caption_columns]
        return clean_captions(
            text for value in values for text in ([value] if isinstance(value, str | bytes) else value or ())
        )

    def key(self, i: int, /) -> str:
        i = position(i, len(self))
        key = None if self.key_column is None else plain(self.key_column[i])
        return _name(self.first + i if key is None else key)

    def label(self, i: int, /) -> str | None:
        i = position(i, len(self))
        label = None if self.label_column is None else plain(self.label_column[i])
        return None if label is None else _name(label)

    def where(self, i: int, /) -> str:
        """The place of pair i on disk."""
        i = position(i, len(self))
        if self.line_column is None:
            return f"{self.file}, row {self.first + i}"
        return f"{self.file}, line {self.line_column[i].as_py()}"

    def _image(self, i: int) -> bytes:
        value = plain(self.image_column[i])
        if isinstance(value, dict):
            content, file = value.get("bytes"), value.get("path")
            is_path = not (isinstance(content, bytes) and content)
            value = (file if isinstance(file, str | bytes) else None) if is_path else content
        else:
            is_path = isinstance(value, str) or (value is not None and is_text(self.image_column.type))
        if is_path and value:
            path = os.fsdecode(value)
            if is_remote(path):
                raise BrokenPair(self.key(i), self.where(i), f"its image lies at {path}: fetch the images first")
            try:
                value = self.storage.read(join(self.folder, path))
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise BrokenPair(self.key(i), self.where(i), f"cannot read image {path}: {reason}") from None
        if not value:
            raise BrokenPair(self.key(i), self.where(i), "its image is empty")
        return bytes(value)


def table_of(
    file: str,
    folder: str,
    storage: Storage,
    need_captions: bool,
    columns: Columns,
    rows: Any,
    images: Any,
    classes: ClassNames,
) -> TableSource:
    """The pairs of an Arrow table. images: their column, which need not be among `rows`; classes: noted names."""
    return TableSource(
        name=file,
        file=file,
        folder=folder,
        storage=storage,
        need_captions=need_captions,
        image_column=images,
        caption_columns=[rows[column] for column in columns.captions],
        label_column=with_names(rows[columns.label], classes.get(columns.label, ())) if columns.label else None,
        key_column=rows[columns.key] if columns.key else None,
    )
