"""Which pair comes when: a pure function of (seed, position)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


class Order:
    """The shuffled order of a set of pairs, cut into batches.

    Every epoch is a fresh permutation that depends on the seed and the epoch alone, and the remainder that fills no
    whole batch is left out (another one in every epoch), so that no batch holds a pair twice. The whole state of a
    loader is therefore one integer, the number of the next batch.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        if batch_size > size:
            raise ValueError(f"batch_size {batch_size} is larger than the set of {size}")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.batches_per_epoch = size // batch_size

    def batch(self, number: int) -> np.ndarray:
        """Indices of the pairs in global batch `number`: int64 [batch_size]."""
        epoch, within = divmod(number, self.batches_per_epoch)
        start = within * self.batch_size
        return _permutation(self.size, self.seed, epoch)[start : start + self.batch_size]


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
