"""Parquet files: small sets in memory, large ones a row group at a time."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from declip.data.sources.base import Pair, one_shard, position
from declip.data.sources.class_labels import ClassNames, names_in_schema
from declip.data.sources.columns import IMAGE_NAMES, Columns, find_columns
from declip.data.sources.table import TableSource, table_of
from declip.data.storage import Storage, is_remote, parent
from declip.errors import InputError, first_line
from declip.pairs import Data

IN_MEMORY = 512_000_000
"""Bytes, unpacked, up to which a set of local files is read into memory."""
_OPEN_GROUPS = 256  # mapped at a time in each process; what is not looked at takes no memory
_IMAGES, _TEXTS = 128, 1 << 16  # rows that are unpacked at a time
_BUFFER = 1 << 22  # bytes of a column that are read at a time
_READERS = 8  # footers that are read at a time: those of remote files are waited for
_TRIES = 5  # to map a file of the cache that another process may drop


@dataclass(frozen=True, slots=True)
class _File:
    """What the footer of a file says. rows: of each row group; size: bytes of all columns, unpacked; classes: names."""

    path: str
    version: str
    rows: tuple[int, ...]
    types: dict[str, Any]
    size: int
    classes: ClassNames


def open_parquet(
    name: str, paths: Sequence[str], data: Data, storage: Storage, *, need_captions: bool
) -> ParquetSource:
    """Open files, local or remote, as one source. Only footers are read, but for small sets of local files.

    Raises InputError where a file cannot be read, a column is missing or has another type than in the first file.
    """
    with ThreadPoolExecutor(_READERS) as readers:
        files = list(readers.map(lambda path: _footer(name if len(paths) == 1 else path, path, storage), paths))
    first = name if len(paths) == 1 else paths[0]
    columns = find_columns(first, files[0].types, data, IMAGE_NAMES, need_captions=need_captions)
    for file in files[1:]:
        for column in columns.names:
            found, expected = file.types.get(column), files[0].types[column]
            if found != expected:
                has = "has no column" if found is None else f"holds {found} in column"
                raise InputError(
                    f"{file.path} {has} {column!r}, where {first} holds {expected}: open files of unlike columns apart."
                )
    return ParquetSource(name, files, columns, storage, need_captions)


def _footer(said: str, path: str, storage: Storage) -> _File:
    version = storage.version(path)
    with storage.open(path) as opened, _said_as(said), pq.ParquetFile(opened) as file:
        about, schema = file.metadata, file.schema_arrow
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        rows = tuple(group.num_rows for group in groups)
        if min(rows, default=0) < 0:
            raise ValueError("a row group of less than no rows")
        # Of all columns: in a damaged file, asking for a single one's can abort the process (pyarrow 26).
        size = sum(group.total_byte_size for group in groups)
        types = dict(zip(schema.names, schema.types, strict=True))
        return _File(path, version, rows, types, size, names_in_schema(schema.metadata))


@contextmanager
def _said_as(said: str) -> Iterator[None]:
    """Says in a sentence that a file is no parquet file, or a damaged one."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:  # a damaged name is a UnicodeDecodeError
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # of the disk that is written to
        raise InputError(f"{said} cannot be read as a parquet file: {first_line(error)}.") from None


class ParquetSource:
    """The pairs of one or many files.

    Of a large set nothing is in memory but the lengths of its row groups, which are its shards. A row group is unpacked
    once, into files of the cache that all processes map: one of its images and one of the rest, so that captions and
    keys can be read without images, and of remote files without fetching them.
    """

    def __init__(
        self, name: str, files: Sequence[_File], columns: Columns, storage: Storage, need_captions: bool
    ) -> None:
        self.name, self.files, self.columns, self.storage = name, list(files), columns, storage
        self.need_captions = need_captions
        self.in_memory = sum(file.size for file in files) <= IN_MEMORY and not any(
            is_remote(file.path) for file in files
        )
        # Parts: files in memory, else row groups. Of each its file, its number there, its first row there, its length.
        parts = []
        for number, file in enumerate(files):
            lengths = [sum(file.rows)] if self.in_memory else file.rows
            firsts = np.cumsum([0, *lengths])
            parts += [(number, g, int(firsts[g]), rows) for g, rows in enumerate(lengths) if rows]
        self._parts = np.array(parts, np.int64).reshape(-1, 4)
        self._starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(self._parts[:, 3])])
        opened = None if self.in_memory else _OPEN_GROUPS
        self._texts = lru_cache(opened)(self._open_texts)
        self._pairs = lru_cache(opened)(self._open_pairs)
        if self.in_memory:
            for part in range(len(parts)):  # now, so that processes that are forked later share it
                self._pairs(part)

    def __reduce__(self) -> tuple[type[ParquetSource], tuple[str, list[_File], Columns, Storage, bool]]:
        return ParquetSource, (self.name, self.files, self.columns, self.storage, self.need_captions)

    @property
    def named(self) -> bool:
        return self.columns.key is not None

    @property
    def shards(self) -> NDArray[np.int64]:
        return one_shard(len(self)) if self.in_memory else self._starts

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int, /) -> Pair:
        part, row = self._find(i)
        return self._pairs(part)[row]

    def captions(self, i: int, /) -> tuple[str, ...]:
        part, row = self._find(i)
        return self._texts(part).captions(row)

    def key(self, i: int, /) -> str:
        part, row = self._find(i)
        return self._texts(part).key(row)

    def label(self, i: int, /) -> str | None:
        part, row = self._find(i)
        return self._texts(part).label(row)

    def where(self, i: int, /) -> str:
        part, row = self._find(i)
        number, _, first, _ = self._parts[part]
        return f"{self._said(self.files[number])}, row {first + row}"

    def _find(self, i: int) -> tuple[int, int]:
        i = position(i, len(self))
        part = int(np.searchsorted(self._starts, i, side="right")) - 1
        return part, i - int(self._starts[part])

    def _said(self, file: _File) -> str:
        return self.name if len(self.files) == 1 else file.path

    def _open_pairs(self, part: int) -> TableSource:
        image = self.columns.image
        if not self.in_memory:
            return replace(self._texts(part), image_column=self._unpacked(part, [image], images=True)[image])
        file = self.files[self._parts[part, 0]]
        with _said_as(self._said(file)), pq.ParquetFile(file.path) as opened:
            rows = opened.read(columns=self.columns.names)
            _check_count(rows.num_rows, int(self._parts[part, 3]))
        self.storage.check_unchanged(file.path, file.version)
        return self._table(part, rows, rows[image])

    def _open_texts(self, part: int) -> TableSource:
        if self.in_memory:
            return self._pairs(part)
        names = [*self.columns.captions, self.columns.label, self.columns.key]
        found = [name for name in dict.fromkeys(names) if name]
        rows = self._unpacked(part, found, images=False) if found else None
        return self._table(part, rows, range(self._parts[part, 3]))  # which gives it its length, without images

    def _table(self, part: int, rows: Any, images: Any) -> TableSource:
        file = self.files[self._parts[part, 0]]
        folder, said = parent(file.path), self._said(file)
        table = table_of(said, folder, self.storage, self.need_captions, self.columns, rows, images, file.classes)
        return replace(table, first=int(self._parts[part, 2]))

    def _unpacked(self, part: int, names: Sequence[str], *, images: bool) -> pa.Table:
        """Columns of a row group, mapped from the cache."""
        number, group, _, length = map(int, self._parts[part])
        file = self.files[number]
        # The absolute path: two folders may hold files of one name, size and time.
        place = file.path if is_remote(file.path) else str(Path(file.path).resolve())
        said = f"Row group {group} of {self._said(file)}"
        name = f"{place} {file.version} {group} {sorted(names)}.arrow"

        def fill(path: Path) -> None:
            self.storage.check_unchanged(file.path, file.version)
            # Images are worth a copy of a remote file; texts alone are not.
            source = self.storage.open(str(self.storage.local(file.path, file.version)) if images else file.path)
            with source, _said_as(self._said(file)), pq.ParquetFile(source, buffer_size=_BUFFER) as opened:
                _check_count(_unpack(opened, group, names, _IMAGES if images else _TEXTS, path), length)
            self.storage.check_unchanged(file.path, file.version)

        for _ in range(_TRIES):
            try:
                with pa.memory_map(str(self.storage.kept(name, fill, said))) as mapped:
                    return pa.ipc.open_file(mapped).read_all()
            except FileNotFoundError:
                continue  # dropped between the two calls
        raise InputError(
            f"{self.storage.folder} loses files faster than they can be opened: say a larger data.disk_gb, so that the "
            "row groups that are read at a time have room."
        )


def _unpack(file: pq.ParquetFile, group: int, names: Sequence[str], batch: int, path: Path) -> int:
    """Write columns of a row group as an Arrow file, `batch` rows at a time. Returns how many rows there were."""
    # The types without dictionaries: an Arrow file cannot hold another one for each batch.
    schema = pa.schema([pa.field(name, _plain(file.schema_arrow.field(name).type)) for name in names])
    count = 0
    rows = file.iter_batches(batch, row_groups=[group], columns=list(names), use_threads=False)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for some in rows:
            writer.write_table(pa.Table.from_batches([some]).select(list(names)).cast(schema))
            count += some.num_rows
    return count


def _check_count(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"it holds {found:,} rows where it says {expected:,}")


def _plain(kind: Any) -> Any:
    return kind.value_type if pa.types.is_dictionary(kind) else kind
