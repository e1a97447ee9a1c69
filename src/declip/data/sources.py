"""Sources: sequences of image-text pairs, whatever format they are stored in.

A source has a length and random access (``source[i]``). Parquet files stay in memory as Arrow tables; a caption table
(CSV, TSV, JSONL) keeps file names and captions in Arrow and reads an image when it is asked for. Sources hold no
Python object per pair, so they are cheap to share with loader processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from operator import index
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from declip.data.tables import FILE_NAMES, IMAGE_NAMES, TEXT_TABLES, Columns, find_columns, text_rows
from declip.errors import InputError, first_line
from declip.recipe import Data

DEMOS = ("noto", "twemoji", "fluent3d")
KINDS = "a .parquet file, a .csv, .tsv or .jsonl caption table, a folder with one, or " + ", ".join(
    f"demo:{name}" for name in DEMOS
)


@dataclass(frozen=True, slots=True)
class Pair:
    """An image with its captions.

    key: the pair's own name; image: encoded bytes (JPEG, PNG, WebP, …); captions: stripped, none is empty;
    label: name of its class, if it has one; where: the place on disk, ``file.parquet, row 17`` (the first row is 0).
    """

    key: str
    image: bytes
    captions: tuple[str, ...]
    label: str | None
    where: str


class BrokenPair(ValueError):
    """A pair that cannot be used: its image cannot be read, or all its captions are empty."""

    def __init__(self, key: str, where: str, reason: str) -> None:
        super().__init__(key, where, reason)  # all three, so that it survives pickling between processes
        self.key, self.where, self.reason = key, where, reason

    def __str__(self) -> str:
        return f"{self.where} (key {self.key}): {self.reason}"


class Source(Protocol):
    """A sequence of pairs. ``source[i]`` raises BrokenPair for a pair that cannot be used, IndexError past the end."""

    @property
    def name(self) -> str:
        """What the user called it."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Pair: ...

    def captions(self, i: int, /) -> tuple[str, ...]:
        """The captions of pair i without reading its image; () where all are empty."""

    def key(self, i: int, /) -> str:
        """The key of pair i without reading its image."""


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

    def __len__(self) -> int:
        return len(self.image_column)

    def __getitem__(self, i: int, /) -> Pair:
        i = _position(i, len(self))
        captions = self.captions(i)
        if self.caption_columns and not captions:
            raise BrokenPair(self.key(i), self.where(i), "it has no caption that is not empty")
        label = None if self.label_column is None else self.label_column[i].as_py()
        return Pair(self.key(i), self._image(i), captions, None if label is None else str(label), self.where(i))

    def captions(self, i: int, /) -> tuple[str, ...]:
        i = _position(i, len(self))
        values = [column[i].as_py() for column in self.caption_columns]
        texts = chain.from_iterable([value] if isinstance(value, str) else value or () for value in values)
        return tuple(stripped for text in texts if text and (stripped := text.strip()))

    def key(self, i: int, /) -> str:
        i = _position(i, len(self))
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


@dataclass(frozen=True, slots=True, eq=False)
class Subset:
    """Some pairs of a source, in the order of the indices (int64 [pairs])."""

    source: Source
    indices: np.ndarray

    @property
    def name(self) -> str:
        return self.source.name

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int, /) -> Pair:
        return self.source[int(self.indices[i])]

    def captions(self, i: int, /) -> tuple[str, ...]:
        return self.source.captions(int(self.indices[i]))

    def key(self, i: int, /) -> str:
        return self.source.key(int(self.indices[i]))


class Concatenation:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.ends = np.cumsum([len(source) for source in sources])
        self.name = " + ".join(source.name for source in sources)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int, /) -> Pair:
        source, j = self._find(i)
        return source[j]

    def captions(self, i: int, /) -> tuple[str, ...]:
        source, j = self._find(i)
        return source.captions(j)

    def key(self, i: int, /) -> str:
        source, j = self._find(i)
        return source.key(j)

    def _find(self, i: int) -> tuple[Source, int]:
        i = _position(i, len(self))
        which = int(np.searchsorted(self.ends, i, side="right"))
        return self.sources[which], i - int(self.ends[which]) + len(self.sources[which])


def _position(i: int, length: int) -> int:
    """A position counted from the start; a negative one counts from the end, as in a list."""
    i = index(i)
    if not -length <= i < length:
        raise IndexError(f"there is no pair {i} among {length}")
    return i % length


def open_sources(specs: Sequence[str], data: Data, *, need_captions: bool = True) -> Source:
    """Open what the user named, several one after the other.

    specs: parquet files, caption tables (columns filename and caption, paths relative to the table; several rows of a
    file name are one pair), folders with such a table, demo:NAME. Columns are found by their names and types, and the
    ones told in ``data`` win. ``need_captions=False`` also opens labelled images without a caption column.

    Raises InputError where there is no such file, it cannot be read, a column is missing, or there are no pairs.
    """
    if not specs:
        raise InputError(f"No data was given: name {KINDS}.")
    sources = [_open(str(spec), data, need_captions) for spec in specs]
    return sources[0] if len(sources) == 1 else Concatenation(sources)


def _open(spec: str, data: Data, need_captions: bool) -> Source:
    kind, _, demo = spec.partition(":")
    if kind == "demo":
        if demo not in DEMOS:
            raise InputError(f"There are no embedded pairs {spec!r}: there are demo:{', demo:'.join(DEMOS)}.")
        with resources.as_file(resources.files("declip") / "data" / "demo" / f"{demo}.parquet") as path:
            return _open_parquet(spec, path, data, need_captions)
    path = Path(spec).expanduser()
    if not path.exists():
        raise InputError(f"There is no file or folder {spec!r}: give {KINDS}.")
    if path.is_dir():
        path = _table_in(path)
    suffix = path.suffix.lower()
    if suffix not in (".parquet", *TEXT_TABLES):
        raise InputError(f"{spec} is of no known kind: give {KINDS}.")
    source = (_open_table if suffix in TEXT_TABLES else _open_parquet)(spec, path, data, need_captions)
    if not len(source):
        raise InputError(f"{spec} holds no pairs.")
    return source


def _table_in(folder: Path) -> Path:
    """The caption table of a folder: captions.csv, .tsv or .jsonl, or the only table there is."""
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in TEXT_TABLES)
    found = [path for path in tables if path.stem == "captions"] or tables
    if not found:
        raise InputError(
            f"Folder {folder} has no caption table: put a captions.csv with the columns filename and caption in it."
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"Folder {folder} has several caption tables ({names}): name the file instead of the folder.")
    return found[0]


def _open_parquet(spec: str, path: Path, data: Data, need_captions: bool) -> TableSource:
    try:
        with pq.ParquetFile(path) as file:
            types = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
            columns = find_columns(spec, types, data, IMAGE_NAMES, need_captions=need_captions)
            rows = file.read(columns=columns.names)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{spec} cannot be read as a parquet file: {first_line(error)}.") from None
    return TableSource(
        name=spec,
        file=spec,
        folder=path.parent,
        image_column=rows[columns.image],
        caption_columns=[rows[name] for name in columns.captions],
        label_column=rows[columns.label] if columns.label else None,
        key_column=rows[columns.key] if columns.key else None,
    )


def _open_table(spec: str, path: Path, data: Data, need_captions: bool) -> TableSource:
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
            folder=path.parent,
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


def split_holdout(source: Source, share: float, seed: int) -> tuple[Subset, Subset]:
    """Split into (train, held out), a share of the pairs (at least one) held out by the hash of their keys.

    Pairs of equal keys stay together, and the split does not depend on the order of the pairs. A share of 0 holds
    out nothing. Raises InputError where nothing would be left to train on.
    """
    hashes = _hashes(source, f"holdout {seed}")
    count = max(1, round(share * len(source))) if share > 0 else 0
    held = hashes <= np.partition(hashes, count - 1)[count - 1] if count else np.zeros(len(source), dtype=bool)
    if held.all():
        raise InputError(
            f"{source.name} has too few pairs ({len(source)}) to hold some out: give data.validation or more pairs."
        )
    return Subset(source, np.flatnonzero(~held)), Subset(source, np.flatnonzero(held))


def take_fraction(source: Source, fraction: float, seed: int) -> Source:
    """A share of the pairs (at least one), in their order; a smaller fraction lies inside a larger one."""
    if fraction >= 1:
        return source
    count = max(1, round(fraction * len(source)))
    chosen = np.argsort(_hashes(source, f"fraction {seed}"), kind="stable")[:count]
    return Subset(source, np.sort(chosen))


def _hashes(source: Source, salt: str) -> np.ndarray:
    """A hash of each pair's key, uint64 [pairs]."""
    start = hashlib.blake2b(salt.encode(), digest_size=8)
    digests = bytearray()
    for i in range(len(source)):
        state = start.copy()
        state.update(source.key(i).encode())
        digests += state.digest()
    return np.frombuffer(bytes(digests), dtype="<u8")
