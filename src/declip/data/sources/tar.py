"""Webdataset tar shards, read at random through an index that is made once and kept beside them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cached_property, lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from declip.data.sources.base import BrokenPair, Pair, clean_captions, position
from declip.data.sources.columns import CAPTION_NAMES, LABEL_NAMES
from declip.data.sources.index_files import index_facts
from declip.data.sources.tar_index import FORMAT, write_tar_index
from declip.data.storage import Storage, is_remote
from declip.errors import InputError, first_line
from declip.pairs import Data

_ASKED = 16  # shards whose state is asked for at a time
_OPEN_SHARDS = 128
_TRIES = 5  # to open a copy
_OPEN_COPIES = 16  # what is open takes room on the disk even when the cache has dropped it


class Indexed(NamedTuple):
    """A shard with the file of its index, fresh, and what that says."""

    shard: str
    version: str
    file: Path
    pairs: int
    problems: list[str]


class TarSource:
    """The pairs of one or many tar shards; nothing of a shard is in memory but how many pairs it has."""

    def __init__(self, name: str, indexed: Sequence[Indexed], data: Data, need_captions: bool) -> None:
        self.name, self.indexed, self.data, self.need_captions = name, list(indexed), data, need_captions
        self.storage = Storage.of(data)
        self.shards: NDArray[np.int64] = np.cumsum([0] + [one.pairs for one in indexed], dtype=np.int64)

    def __reduce__(self) -> tuple[type[TarSource], tuple[str, list[Indexed], Data, bool]]:
        return TarSource, (self.name, self.indexed, self.data, self.need_captions)

    @property
    def named(self) -> bool:
        return True

    @property
    def problems(self) -> list[str]:
        """What is wrong with the shards, a sentence each."""
        return [f"{one.shard}: {said}" for one in self.indexed for said in one.problems]

    def __len__(self) -> int:
        return int(self.shards[-1])

    def __getitem__(self, i: int, /) -> Pair:
        shard, row = self._find(i)
        key, where = shard.key(row), self.where(i)
        image = shard.read("image", row)
        if image is None:
            raise BrokenPair(key, where, "it has no image")
        if not image:
            raise BrokenPair(key, where, "its image is empty")
        captions, label = self._texts(shard, row)
        if not captions and (self.need_captions or label is None):
            raise BrokenPair(key, where, "it has no caption that is not empty")
        return Pair(key, image, captions, label, where)

    def captions(self, i: int, /) -> tuple[str, ...]:
        return self._texts(*self._find(i))[0]

    def key(self, i: int, /) -> str:
        shard, row = self._find(i)
        return shard.key(row)

    def label(self, i: int, /) -> str | None:
        return self._texts(*self._find(i))[1]

    def where(self, i: int, /) -> str:
        shard, row = self._find(i)
        return f"{shard.path}, member {shard.key(row)}"

    def _find(self, i: int) -> tuple[_Shard, int]:
        i = position(i, len(self))
        number = int(np.searchsorted(self.shards, i, side="right")) - 1
        shard, version, index, _, _ = self.indexed[number]
        opened = _opened_copy if is_remote(shard) else _opened
        return opened(shard, version, index, self.storage), i - int(self.shards[number])

    def _texts(self, shard: _Shard, row: int) -> tuple[tuple[str, ...], str | None]:
        """Captions and label: of the members .txt and .cls, else of the fields of .json.

        A .json that holds the caption of the .txt among others has all of them, as `declip data pack` writes it.
        """
        fields = _fields(shard.read("json", row))
        text = None if self.data.captions else shard.read("text", row)
        found = [fields[name] for name in self.data.captions or CAPTION_NAMES if fields.get(name)]
        captions = clean_captions(text for value in found[: len(self.data.captions) or 1] for text in _strings(value))
        if text is not None:
            own = clean_captions([text])
            if not own or own[0] not in captions:
                captions = own
        label = shard.read("label", row)
        if label is not None:
            return captions, label.decode("utf-8", "replace").strip() or None
        named = [self.data.label] if self.data.label else LABEL_NAMES
        value = next((fields[name] for name in named if fields.get(name) is not None), None)
        return captions, None if value is None else str(value)


class _Shard:
    """An open shard with its index mapped."""

    def __init__(self, path: str, version: str, index: Path, storage: Storage) -> None:
        self.path, self.version, self.storage = path, version, storage
        table = pa.ipc.open_file(pa.memory_map(str(index))).read_all()
        self.keys = table["key"]
        self.columns = {name: np.asarray(table[name].combine_chunks()) for name in table.schema.names if name != "key"}

    @cached_property
    def file(self) -> int:
        """The descriptor of the open file; a remote one is fetched now."""
        for tried in range(1, _TRIES + 1):
            try:
                return os.open(self.storage.local(self.path, self.version), os.O_RDONLY)
            except OSError as error:
                # The cache may have dropped the copy between the two calls.
                if not (is_remote(self.path) and isinstance(error, FileNotFoundError) and tried < _TRIES):
                    raise InputError(f"{self.path} cannot be opened: {first_line(error)}.") from None
        raise AssertionError  # the last try returns or raises

    def __del__(self) -> None:
        if "file" in self.__dict__:
            os.close(self.file)

    def key(self, row: int) -> str:
        return str(self.keys[row].as_py())

    def read(self, role: str, row: int) -> bytes | None:
        """The bytes of a member; None where the pair has none of this role."""
        at = int(self.columns[f"{role}_at"][row])
        if at < 0:
            return None
        size = int(self.columns[f"{role}_size"][row])
        data = os.pread(self.file, size, at)  # not seek and read, as forked processes share the descriptor's position
        if len(data) < size:
            raise InputError(f"{self.path} is shorter than when it was opened: start again.")
        return data


# Of all sources together, as a process may only have so many files open.
_opened = lru_cache(_OPEN_SHARDS)(_Shard)
_opened_copy = lru_cache(_OPEN_COPIES)(_Shard)


def _fields(data: bytes | None) -> dict[str, Any]:
    """The fields of a .json member; none where it is no JSON object."""
    if data is None:
        return {}
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _strings(value: object) -> Iterator[str]:
    return (text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str))


def open_tar(name: str, paths: Sequence[str], data: Data, need_captions: bool) -> TarSource:
    """Open tar shards, local or remote; index first those that have no index or an old one.

    Raises InputError where a shard cannot be read.
    """
    storage = Storage.of(data)
    with ThreadPoolExecutor(_ASKED) as pool:
        # Remote places are waited for; local files are not, and threads would only get in each other's way.
        ask = pool.map if any(map(is_remote, paths)) else map
        found = dict(zip(paths, ask(lambda path: _indexed(path, storage), paths), strict=True))
    stale = [path for path in found if found[path] is None]
    if len(stale) > 1:
        if sys.stderr.isatty():
            print(f"Indexing {len(stale):,} tar shards of {name} …", file=sys.stderr)
        with ProcessPoolExecutor(mp_context=get_context("fork" if sys.platform == "linux" else None)) as processes:
            made = list(processes.map(_index, stale, [storage] * len(stale)))
    else:
        made = [_index(path, storage) for path in stale]
    found.update(zip(stale, made, strict=True))
    source = TarSource(name, [one for path in paths if (one := found[path])], data, need_captions)
    for problem in source.problems:
        print(f"declip: {problem}", file=sys.stderr)
    return source


def _index(path: str, storage: Storage) -> Indexed:
    """Index a shard."""
    version = storage.version(path)  # first: one that changes meanwhile has an old index
    index = write_tar_index(path, storage.local(path), version, storage.index_places(path))
    facts = index_facts(index) or {}
    return Indexed(path, version, index, facts["pairs"], facts["problems"])


def _indexed(path: str, storage: Storage) -> Indexed | None:
    """The index of a shard, whole and made of the shard as it is now; None where there is none."""
    version = storage.version(path)
    for index in storage.index_places(path):
        facts = index_facts(index)
        if facts and facts.get("format") == FORMAT and facts.get("shard") == version:
            return Indexed(path, version, index, facts["pairs"], facts["problems"])
    return None
