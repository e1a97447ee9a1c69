"""Parts of a source: held-out pairs, and a fraction."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from declip.data.order import permuted
from declip.data.sources.base import Source, Subset, Wrapped, position
from declip.errors import InputError

BY_KEY = 2**20
"""Sets up to this size are split by their keys. Of larger ones not even the keys are read."""

MOST_HELD = 20_000
"""Held-out pairs of a set that is not split by keys: far more than are judged."""

HELD_SHARDS = 64
"""Shards that those are in, or as many as have twice so many pairs: stores are read shard by shard."""


class Without(Wrapped):
    """A source without some of its pairs, in memory for those alone."""

    def __init__(self, source: Source, removed: NDArray[np.int64]) -> None:
        """`removed`: indices of the pairs left out, rising and each once."""
        self.source, self.removed = source, removed
        # How many pairs stay before each one that is removed.
        self._kept_before = removed - np.arange(len(removed))

    @property
    def shards(self) -> NDArray[np.int64]:
        shards = self.source.shards
        return np.unique(shards - np.searchsorted(self.removed, shards))

    def __len__(self) -> int:
        return len(self.source) - len(self.removed)

    def _index(self, i: int) -> int:
        i = position(i, len(self))
        return i + int(np.searchsorted(self._kept_before, i, side="right"))


def split_holdout(source: Source, share: float, seed: int) -> tuple[Without, Subset]:
    """Split into (train, held out), a share of the pairs (at least one) held out by the hash of their keys.

    Pairs of equal keys stay together, and the split does not depend on the order of the pairs. A share of 0 holds
    out nothing. Of more than BY_KEY pairs, MOST_HELD at most are held out, by their place in a few random shards.
    Raises InputError where nothing would be left to train on.
    """
    count = max(1, round(share * len(source))) if share > 0 else 0
    if len(source) > BY_KEY:
        held = _of_few_shards(source.shards, min(count, MOST_HELD), seed)
    else:
        hashes = _hashes(source, f"holdout {seed}")
        held = np.flatnonzero(hashes <= np.partition(hashes, count - 1)[count - 1]) if count else np.arange(0)
    if len(held) == len(source):
        raise InputError(
            f"{source.name} has too few pairs ({len(source)}) to hold some out: give data.validation or more pairs."
        )
    return Without(source, held), Subset(source, held)


def hold_out_groups(source: Source, share: float, seed: int, groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of a share of the pairs (at least one), rising; pairs of a group, and of equal keys, stay together.

    groups: int64 [pairs], of each pair the first one of its group. Groups are drawn by a hash of their keys, so
    that the split does not depend on the order of the pairs; one that is larger than what is still to be held out is
    passed over. Raises InputError where nothing would be left to train on.
    """
    count = max(1, round(share * len(source)))
    hashes = _hashes(source, f"holdout {seed}")
    _, first, equal = np.unique(hashes, return_index=True, return_inverse=True)
    own = np.arange(len(source))
    groups = connected(len(source), np.concatenate([np.stack([own, groups], 1), np.stack([own, first[equal]], 1)]))
    names, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    least = np.full(len(names), np.iinfo(np.uint64).max)
    np.minimum.at(least, group, hashes)
    # The least of many hashes is small: hashed again, a large group comes no sooner than a small one.
    drawn = np.frombuffer(b"".join(hashlib.blake2b(one.tobytes(), digest_size=8).digest() for one in least), "<u8")
    order = np.argsort(drawn, kind="stable")
    chosen, left = [], count
    for one in order.tolist():
        if sizes[one] <= left:
            chosen.append(one)
            left -= int(sizes[one])
    if not chosen:
        chosen = [int(order[np.argmin(sizes[order])])]
    held = np.flatnonzero(np.isin(group, chosen))
    if len(held) == len(source):
        raise InputError(
            f"{source.name} has nothing to hold out: all {len(source)} pictures are copies of one another; give "
            "data.validation or other pairs."
        )
    return held


def connected(count: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of so many items the groups that `pairs` [n, 2] connect: int64 [count], the first item of each one's group."""
    first = list(range(count))

    def root(item: int) -> int:
        while first[item] != item:
            first[item] = first[first[item]]
            item = first[item]
        return item

    for one, other in pairs.tolist():
        low, high = sorted((root(one), root(other)))
        first[high] = low
    return np.array([root(item) for item in range(count)], np.int64)


def _of_few_shards(shards: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Indices of some pairs, rising, in a few random shards: all that has to be reached to judge them."""
    total = len(shards) - 1
    enough = max(HELD_SHARDS, -(-2 * count * total // int(shards[-1])))
    chosen = np.sort(permuted(np.arange(min(enough, total)), total, (seed, 2, 0)))
    ends = np.cumsum(shards[chosen + 1] - shards[chosen])
    count = min(count, int(ends[-1]))
    places = np.sort(permuted(np.arange(count), int(ends[-1]), (seed, 0, 0)))
    which = np.searchsorted(ends, places, side="right")
    return shards[chosen[which] + 1] - ends[which] + places


def take_fraction(source: Source, fraction: float, seed: int) -> Source:
    """A share of the pairs (at least one), in their order; a smaller fraction lies inside a larger one."""
    if fraction >= 1:
        return source
    count = max(1, round(fraction * len(source)))
    if len(source) > BY_KEY:
        chosen = permuted(np.arange(count), len(source), (seed, 1, 0))
    else:
        chosen = np.argsort(_hashes(source, f"fraction {seed}"), kind="stable")[:count]
    return Subset(source, np.sort(chosen))


def _hashes(source: Source, salt: str) -> NDArray[np.uint64]:
    """A hash of each pair's key, uint64 [pairs]."""
    start = hashlib.blake2b(salt.encode(), digest_size=8)
    digests = bytearray()
    for i in range(len(source)):
        state = start.copy()
        state.update(source.key(i).encode())
        digests += state.digest()
    return np.frombuffer(bytes(digests), dtype="<u8")
