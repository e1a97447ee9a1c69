"""Webdataset tar shards, read at random through an index that is made once and kept beside them."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from declip.data.sources.base import BrokenPair, Pair, clean_captions, position
from declip.data.sources.columns import CAPTION_NAMES, LABEL_NAMES
from declip.data.sources.tar_index import read_facts, version, write_index
from declip.errors import InputError, first_line
from declip.pairs import Data

_OPEN_SHARDS = 128


class Indexed(NamedTuple):
    """A shard with the file of its index, fresh, and what that says."""

    shard: Path
    file: Path
    pairs: int
    problems: list[str]


class TarSource:
    """The pairs of one or many tar shards; nothing of a shard is in memory but how many pairs it has."""

    def __init__(self, name: str, indexed: Sequence[Indexed], data: Data) -> None:
        self.name, self.indexed, self.data = name, list(indexed), data
        self.shards: NDArray[np.int64] = np.cumsum([0] + [one.pairs for one in indexed], dtype=np.int64)
        self._opened = lru_cache(_OPEN_SHARDS)(self._open)

    def __reduce__(self) -> tuple[type[TarSource], tuple[str, list[Indexed], Data]]:
        return TarSource, (self.name, self.indexed, self.data)

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
        if not captions and label is None:
            raise BrokenPair(key, where, "it has no caption that is not empty")
        return Pair(key, image, captions, label, where)

    def captions(self, i: int, /) -> tuple[str, ...]:
        return self._texts(*self._find(i))[0]

    def key(self, i: int, /) -> str:
        shard, row = self._find(i)
        return shard.key(row)

    def where(self, i: int, /) -> str:
        shard, row = self._find(i)
        return f"{shard.path}, member {shard.key(row)}"

    def _find(self, i: int) -> tuple[_Shard, int]:
        i = position(i, len(self))
        number = int(np.searchsorted(self.shards, i, side="right")) - 1
        return self._opened(number), i - int(self.shards[number])

    def _open(self, number: int) -> _Shard:
        return _Shard(self.indexed[number].shard, self.indexed[number].file)

    def _texts(self, shard: _Shard, row: int) -> tuple[tuple[str, ...], str | None]:
        """Captions and label: of the members .txt and .cls, else of the fields of .json."""
        fields = _fields(shard.read("json", row))
        names = self.data.captions or CAPTION_NAMES
        text = None if self.data.captions else shard.read("text", row)
        found = next((fields[name] for name in names if fields.get(name)), None)
        captions = clean_captions([text] if text is not None else _strings(found))
        label = shard.read("label", row)
        if label is not None:
            return captions, label.decode("utf-8", "replace").strip() or None
        named = [self.data.label] if self.data.label else LABEL_NAMES
        value = next((fields[name] for name in named if fields.get(name) is not None), None)
        return captions, None if value is None else str(value)


class _Shard:
    """An open shard with its index mapped."""

    def __init__(self, path: Path, index: Path) -> None:
        self.path = path
        table = pa.ipc.open_file(pa.memory_map(str(index))).read_all()
        self.keys = table["key"]
        self.columns = {name: np.asarray(table[name].combine_chunks()) for name in table.schema.names if name != "key"}
        try:
            self.file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"{path} cannot be opened: {first_line(error)}.") from None

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)

    def key(self, row: int) -> str:
        return str(self.keys[row].as_py())

    def read(self, role: str, row: int) -> bytes | None:
        """The bytes of a member; None where the pair has none of this role."""
        at = int(self.columns[f"{role}_at"][row])
        # pread, as forked processes share the descriptor's position
        return None if at < 0 else os.pread(self.file, int(self.columns[f"{role}_size"][row]), at)


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


def open_tar(name: str, paths: Sequence[Path], data: Data) -> TarSource:
    """Open tar shards, index first those that have no index or an old one.

    Raises InputError where a shard cannot be read.
    """
    places = {path: _index_places(path, data) for path in paths}
    found = {path: _indexed(path, places[path]) for path in paths}
    stale = [path for path in found if found[path] is None]
    if len(stale) > 1:
        if sys.stderr.isatty():
            print(f"Indexing {len(stale):,} tar shards of {name} …", file=sys.stderr)
        with ProcessPoolExecutor(mp_context=get_context("fork" if sys.platform == "linux" else None)) as pool:
            made = list(pool.map(_index, stale, [places[path] for path in stale]))
    else:
        made = [_index(path, places[path]) for path in stale]
    found.update(zip(stale, made, strict=True))
    source = TarSource(name, [one for path in paths if (one := found[path])], data)
    for problem in source.problems:
        print(f"declip: {problem}", file=sys.stderr)
    return source


def _index_places(path: Path, data: Data) -> list[Path]:
    """Beside the shard, or where that cannot be written, in the folder for indices."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "declip"
    folder = Path(data.index_folder).expanduser() if data.index_folder else cache
    digest = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=8).hexdigest()
    return [path.with_name(path.name + ".index"), folder / f"{path.name}.{digest}.index"]


def _index(path: Path, places: Sequence[Path]) -> Indexed:
    """Write a shard's index to the first place that can be written."""
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_index(path, place)
        except OSError as error:
            failed = error
        else:
            facts = read_facts(place)
            return Indexed(path, place, facts["pairs"], facts["problems"])
    raise InputError(
        f"The index of {path} can be written nowhere ({first_line(failed)}): say data.index_folder=FOLDER."
    ) from None


def _indexed(path: Path, places: Sequence[Path]) -> Indexed | None:
    """The index of a shard, whole and made of the shard as it is now; None where there is none."""
    try:
        now = version(path)
    except FileNotFoundError:
        raise InputError(f"There is no tar shard {path}.") from None
    for place in places:
        try:
            facts = read_facts(place)
            if facts["shard"] == now:
                return Indexed(path, place, facts["pairs"], facts["problems"])
        except (OSError, ValueError, KeyError, pa.ArrowException):
            continue
    return None
