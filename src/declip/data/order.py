"""Which pair comes when: a pure function of (seed, position), in constant memory for any number of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from declip.errors import InputError

Indices = NDArray[np.int64]

WINDOW = 65536
_LISTED = 2**20  # up to so many, a permutation is a list of 8 MB at most; beyond it is computed, number by number
_ROUNDS = 8
_TRIES = 32


class BatchOrder(Protocol):
    """The pairs of each global batch."""

    batch_size: int

    def batch(self, number: int) -> Indices:
        """Indices of the pairs in global batch `number`: int64 [batch_size]."""

    def epochs(self, number: int) -> Indices:
        """How often each pair of that batch has come before, about: the epoch of its source, int64 [batch_size]."""


class Order:
    """The shuffled order of a set of pairs, cut into batches.

    Every epoch is a fresh permutation that depends on the seed and the epoch alone, so that the whole state of a
    loader is one integer, the number of the next batch. Shards are shuffled, then the pairs of a few shards that come
    one after the other (a window), so that what is read at a time lies in few places.

    The remainder that fills no whole batch opens the first batch of the next epoch, and no batch holds a pair twice.
    A set of fewer than four batches leaves the remainder out instead, another one in every epoch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        shards: Indices | None = None,
        window: int = WINDOW,
        doubles: bool = False,
    ) -> None:
        """`shards`: where each begins, and the size at the end (default: one); `window`: pairs shuffled together.

        doubles: epochs simply follow one another, and the batch across their border may hold a pair twice.
        """
        if batch_size > size and not doubles:
            raise ValueError(f"batch_size {batch_size} is larger than the set of {size}")
        self.size, self.batch_size, self.seed, self.window = size, batch_size, seed, window
        self.shards = np.array([0, size], np.int64) if shards is None else shards
        self.doubles = doubles
        self.carries = size >= 4 * batch_size and not doubles
        self.epoch_length = size if self.carries or doubles else size // batch_size * batch_size
        self._epoch = lru_cache(4)(self._lay_out)
        self._exchanged = lru_cache(4)(self._exchanges)

    def __reduce__(self) -> tuple[type[Order], tuple[int, int, int, Indices, int, bool]]:
        return Order, (self.size, self.batch_size, self.seed, self.shards, self.window, self.doubles)

    def batch(self, number: int) -> Indices:
        """Indices of the pairs in global batch `number`: int64 [batch_size]."""
        start = number * self.batch_size
        return self.at(np.arange(start, start + self.batch_size))

    def epochs(self, number: int) -> Indices:
        start = number * self.batch_size
        return np.arange(start, start + self.batch_size) // self.epoch_length

    def at(self, positions: Indices) -> Indices:
        """Indices of the pairs at global positions: int64 [positions]."""
        epochs, within = np.divmod(positions, self.epoch_length)
        out = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            out[chosen] = self._at(self._without_doubles(within[chosen], epoch), epoch)
        return out

    def _at(self, positions: Indices, epoch: int) -> Indices:
        """Positions of one epoch to indices."""
        layout = self._epoch(epoch)
        windows = np.searchsorted(layout.windows, positions, side="right") - 1
        places = np.empty(len(positions), np.int64)
        for number in np.unique(windows).tolist():
            chosen, start, end = windows == number, layout.windows[number], layout.windows[number + 1]
            places[chosen] = start + permuted(positions[chosen] - start, int(end - start), (self.seed, epoch, number))
        slots = np.searchsorted(layout.slots, places, side="right") - 1
        return np.asarray(layout.starts[slots] + places - layout.slots[slots])

    def _lay_out(self, epoch: int) -> _Epoch:
        sizes = np.diff(self.shards)
        several = self.size > self.window and len(sizes) > 1
        order = _shuffled_shards(self.shards, self.seed, epoch) if several else np.arange(len(sizes))
        slots = np.concatenate([[0], np.cumsum(sizes[order])])
        # A window ends with the shard that fills it.
        first = np.flatnonzero(np.diff(slots[:-1] // self.window, prepend=-1)) if several else np.array([0])
        return _Epoch(self.shards[order], slots, np.concatenate([slots[first], [self.size]]))

    def _without_doubles(self, positions: Indices, epoch: int) -> Indices:
        """Exchange what the batch across the border of two epochs would hold twice for what comes soon after it."""
        if not (self.carries and epoch and len(positions)) or positions.min() >= 3 * self.batch_size:
            return positions
        exchanged = self._exchanged(epoch)
        return np.array([exchanged.get(p, p) for p in positions.tolist()], np.int64) if exchanged else positions

    def _exchanges(self, epoch: int) -> dict[int, int]:
        old = epoch * self.size % self.batch_size  # how many pairs of the batch belong to the epoch before
        if not old:
            return {}
        last = set(self._at(np.arange(self.size - old, self.size), epoch - 1).tolist())
        new = self.batch_size - old
        opening = self._at(np.arange(3 * self.batch_size), epoch).tolist()
        doubles = [place for place in range(new) if opening[place] in last]
        free = (place for place in range(new, len(opening)) if opening[place] not in last)
        pairs = list(zip(doubles, free, strict=False))
        return dict(pairs) | {b: a for a, b in pairs}


class _Epoch(NamedTuple):
    """The shards of an epoch in their order."""

    starts: Indices  # where each shard begins in storage
    slots: Indices  # at which position of the epoch each shard begins, and the size at the end
    windows: Indices  # at which position each window begins, and the size at the end


def _shuffled_shards(shards: Indices, seed: int, epoch: int) -> Indices:
    """An order of the shards: of a few random ones, the one that has least to do with the order of storage."""
    rng = np.random.default_rng([seed, epoch])
    centres = (shards[:-1] + shards[1:]) / 2
    best, least = np.arange(len(centres)), np.inf
    for _ in range(_TRIES):
        order = rng.permutation(len(centres))
        ends = np.cumsum(np.diff(shards)[order])
        places = ends - np.diff(shards)[order] / 2
        related = abs(np.corrcoef(places, centres[order])[0, 1])
        if related < least:
            best, least = order, related
    return best


def permuted(positions: Indices, size: int, key: tuple[int, int, int]) -> Indices:
    """Where a random permutation of `size` numbers takes some of them."""
    if size <= _LISTED:
        return _listed(size, key)[positions]
    return _computed(positions, size, key)


@lru_cache(maxsize=4)
def _listed(size: int, key: tuple[int, int, int]) -> Indices:
    return np.random.default_rng(list(key)).permutation(size)


def _computed(positions: Indices, size: int, key: tuple[int, int, int]) -> Indices:
    """A permutation without a list of it: a Feistel network over a power of four, walked until it is below `size`.

    Black and Rogaway 2002, "Ciphers with arbitrary finite domains", method 2 (cycle walking).
    """
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence(list(key)).generate_state(_ROUNDS, np.uint64)
    out = positions.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        out[todo] = left << half | right
        todo = todo[out[todo] >= size]
    return out.astype(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Mixture:
    """Batches out of several orders, each with its share of every batch; a source goes through its own epochs.

    The shares of a batch follow the weights to within a pair, and over many batches exactly.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int) -> None:
        """Raises InputError where a share is less than two pairs a batch, or the weights do not fit the sources."""
        self.orders, self.seed, self.batch_size = list(orders), seed, orders[0].batch_size
        if len(weights) != len(orders) or not all(weight > 0 for weight in weights):
            raise InputError(
                f"data.weights has {len(weights)} numbers for {len(orders)} sources in data.train: "
                "give each source one, above zero."
            )
        self.bounds = np.concatenate([[0.0], np.cumsum(weights) / np.sum(weights)])
        if (np.diff(self.bounds) * self.batch_size).min() < 2:
            raise InputError(
                f"data.weights gives a source less than two pairs of a batch of {self.batch_size}: "
                "raise its weight or schedule.batch_size."
            )
        self.offsets = np.cumsum([0] + [order.size for order in orders])

    def batch(self, number: int) -> Indices:
        """Indices of the pairs in global batch `number`, in the sources one after the other: int64 [batch_size]."""
        places = zip(self.orders, self._places(number), self.offsets, strict=False)
        return self._mixed(number, [order.at(positions) + offset for order, positions, offset in places])

    def epochs(self, number: int) -> Indices:
        places = zip(self.orders, self._places(number), strict=True)
        return self._mixed(number, [positions // order.epoch_length for order, positions in places])

    def _mixed(self, number: int, parts: list[Indices]) -> Indices:
        return np.random.default_rng([self.seed, number]).permutation(np.concatenate(parts))

    def _places(self, number: int) -> list[Indices]:
        """The positions in each source that a batch takes."""
        before, after = (self._taken(n * self.batch_size) for n in (number, number + 1))
        return [np.arange(start, end) for start, end in zip(before, after, strict=True)]

    def _taken(self, position: int) -> list[int]:
        """How many pairs of each source come before a position."""
        bounds = np.floor(self.bounds * position + 0.5).astype(np.int64)
        bounds[-1] = position
        taken: list[int] = np.diff(bounds).tolist()
        return taken
