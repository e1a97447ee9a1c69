"""Parts of a source: held-out pairs, and a fraction."""

from __future__ import annotations

import hashlib

import numpy as np

from declip.data.sources.base import Source, Subset
from declip.errors import InputError


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
