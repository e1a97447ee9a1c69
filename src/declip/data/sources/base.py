"""What every source is: a sequence of pairs with a length and random access, whatever format they are stored in.

Sources hold no Python object per pair, so they are cheap to share with loader processes: what is large is in Arrow
memory or mapped from a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

LONGEST_CAPTION = 8192
"""Characters of a caption that are read: far more than any text tower takes."""


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

    @property
    def named(self) -> bool:
        """Whether keys are names of the pairs' own, and not their rows' numbers."""

    @property
    def shards(self) -> NDArray[np.int64]:
        """Where each shard begins, and the length at the end: [shards + 1].

        The pairs of a shard lie together and are best read together. Pairs that all cost the same to reach are one
        shard.
        """

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Pair: ...

    def captions(self, i: int, /) -> tuple[str, ...]:
        """The captions of pair i without reading its image; () where all are empty."""

    def key(self, i: int, /) -> str:
        """The key of pair i without reading its image."""

    def label(self, i: int, /) -> str | None:
        """The label of pair i without reading its image."""

    def where(self, i: int, /) -> str:
        """The place of pair i on disk, for a message."""


def clean_captions(texts: Iterable[str | bytes | None]) -> tuple[str, ...]:
    """Captions as pairs hold them: stripped, cut to LONGEST_CAPTION, no NUL characters, none empty.

    Bytes are UTF-8; a caption that is not is left out.
    """
    cleaned = []
    for text in texts:
        if isinstance(text, bytes):
            kept = text[: 4 * LONGEST_CAPTION]  # a character has four bytes at most, and a cut may fall within one
            try:
                text = kept.decode("utf-8", "strict" if kept == text else "ignore")
            except UnicodeDecodeError:
                continue
        if not text:
            continue
        text = text[: 2 * LONGEST_CAPTION].replace("\0", " ").strip()[:LONGEST_CAPTION]
        if text:
            cleaned.append(text)
    return tuple(cleaned)


def one_shard(length: int) -> NDArray[np.int64]:
    """The shards of a source whose pairs all cost the same to reach."""
    return np.array([0, length], np.int64)


def position(i: int, length: int) -> int:
    """A position counted from the start; a negative one counts from the end, as in a list."""
    i = index(i)
    if not -length <= i < length:
        raise IndexError(f"there is no pair {i} among {length}")
    return i % length


class Concatenation:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source], name: str | None = None) -> None:
        self.sources = list(sources)
        self.ends = np.cumsum([len(source) for source in sources])
        self.name = name or " + ".join(source.name for source in sources)

    @property
    def named(self) -> bool:
        return all(source.named for source in self.sources)

    @property
    def shards(self) -> NDArray[np.int64]:
        starts = [source.shards[:-1] + end - len(source) for source, end in zip(self.sources, self.ends, strict=True)]
        return np.concatenate([*starts, self.ends[-1:]])

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

    def label(self, i: int, /) -> str | None:
        source, j = self._find(i)
        return source.label(j)

    def where(self, i: int, /) -> str:
        source, j = self._find(i)
        return source.where(j)

    def _find(self, i: int) -> tuple[Source, int]:
        i = position(i, len(self))
        which = int(np.searchsorted(self.ends, i, side="right"))
        return self.sources[which], i - int(self.ends[which]) + len(self.sources[which])


def joined(sources: Sequence[Source], name: str | None = None) -> Source:
    """One source out of several; a single one stays as it is."""
    return sources[0] if len(sources) == 1 else Concatenation(sources, name)


class Wrapped:
    """Pairs of another source: what a subclass does not change is that source's own.

    A subclass has `source` and its own `__len__`, `shards` and `_index`.
    """

    __slots__ = ()

    source: Source

    def _index(self, i: int) -> int:
        """Where pair i stands in the source."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def named(self) -> bool:
        return self.source.named

    def __getitem__(self, i: int, /) -> Pair:
        return self.source[self._index(i)]

    def captions(self, i: int, /) -> tuple[str, ...]:
        return self.source.captions(self._index(i))

    def key(self, i: int, /) -> str:
        return self.source.key(self._index(i))

    def label(self, i: int, /) -> str | None:
        return self.source.label(self._index(i))

    def where(self, i: int, /) -> str:
        return self.source.where(self._index(i))


@dataclass(frozen=True, slots=True, eq=False)
class Subset(Wrapped):
    """Some pairs of a source, in the order of the indices (int64 [pairs], rising)."""

    source: Source
    indices: np.ndarray

    @property
    def shards(self) -> NDArray[np.int64]:
        return np.unique(np.searchsorted(self.indices, self.source.shards))

    def __len__(self) -> int:
        return len(self.indices)

    def _index(self, i: int) -> int:
        return int(self.indices[i])


def whole_of(source: Source) -> tuple[Source, NDArray[np.int64]]:
    """The source without what leaves pairs out, and where each pair stands in it: int64 [pairs]."""
    if isinstance(source, Wrapped):
        whole, places = whole_of(source.source)
        return whole, places[np.fromiter(map(source._index, range(len(source))), np.int64, len(source))]
    if isinstance(source, Concatenation):
        parts = [whole_of(part) for part in source.sources]
        starts = np.cumsum([0, *(len(whole) for whole, _ in parts)])
        found = [places + start for (_, places), start in zip(parts, starts[:-1], strict=True)]
        return Concatenation([whole for whole, _ in parts], source.name), np.concatenate(found)
    return source, np.arange(len(source))
