"""Batches in which nothing stands twice: equal captions or equal images are false negatives to one another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable
from functools import lru_cache

import numpy as np

from declip.data.order import BatchOrder, Indices
from declip.data.sources import BrokenPair, Source

BLOCK = 16


class Apart:
    """An order with the pairs of every BLOCK batches handed out anew, so that equals come into different batches.

    Every pair still comes as often as in the order below, at most BLOCK batches earlier or later, and a batch is still
    a pure function of its number. Where there are more equals than batches in a block, the rest stay together.
    """

    def __init__(self, order: BatchOrder, features: Callable[[int], Iterable[Hashable]]) -> None:
        """`features`: of a pair, by its index; two pairs are equal where they share one."""
        self.order, self.features, self.batch_size = order, features, order.batch_size
        self._block = lru_cache(2)(self._hand_out)

    def __reduce__(self) -> tuple[type[Apart], tuple[BatchOrder, Callable[[int], Iterable[Hashable]]]]:
        return Apart, (self.order, self.features)

    def batch(self, number: int) -> Indices:
        """Indices of the pairs in global batch `number`: int64 [batch_size]."""
        return self._column(number, 0)

    def epochs(self, number: int) -> Indices:
        return self._column(number, 1)

    def _column(self, number: int, which: int) -> Indices:
        block, within = divmod(number, BLOCK)
        return np.array(self._block(block)[within], np.int64)[:, which]

    def _hand_out(self, block: int) -> list[list[tuple[int, int]]]:
        """Each pair, with its epoch, to its own batch, else to the next one that has room and nothing equal."""
        batches: list[list[tuple[int, int]]] = [[] for _ in range(BLOCK)]
        seen: list[set[Hashable]] = [set() for _ in range(BLOCK)]
        left = []
        for own in range(BLOCK):
            number = block * BLOCK + own
            for index, epoch in zip(self.order.batch(number).tolist(), self.order.epochs(number).tolist(), strict=True):
                features = {("pair", index), *self.features(index)}  # a pair is always equal to itself
                for step in range(BLOCK):
                    which = (own + step) % BLOCK
                    if len(batches[which]) < self.batch_size and seen[which].isdisjoint(features):
                        batches[which].append((index, epoch))
                        seen[which] |= features
                        break
                else:
                    left.append((index, epoch))
        for batch in batches:
            while len(batch) < self.batch_size:
                batch.append(left.pop())
        return batches


def text_hash(text: str) -> int:
    """A caption as a number below 2⁶³, the same for captions that differ in case and white space only."""
    return _hash(" ".join(text.lower().split()).encode("utf-8", "surrogatepass"))


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


class CaptionFeatures:
    """The captions of a pair as numbers, for `Apart`."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __call__(self, index: int) -> list[int]:
        return [text_hash(caption) for caption in self.source.captions(index)]


class ImageFeatures:
    """The encoded image of a pair as a number, for `Apart`; every image is read once, at the start."""

    def __init__(self, source: Source) -> None:
        self.hashes = np.array([self._of(source, index) for index in range(len(source))], np.int64)

    def __call__(self, index: int) -> list[int]:
        return [int(self.hashes[index])]

    @staticmethod
    def _of(source: Source, index: int) -> int:
        try:
            return _hash(source[index].image)
        except BrokenPair:
            return -1 - index
