"""Which pairs of a scanned source hold the same image, and what it has in common with a test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from declip.curation.duplicates import Pairs, near_duplicates
from declip.curation.fingerprints import hash_bytes
from declip.curation.scan import Scan
from declip.data.decode import decode_image

Indices = NDArray[np.int64]
_HASHES = ("pixel_hash", "data_hash")


@dataclass(frozen=True, slots=True)
class Copies:
    """Pairs with one image.

    first: [pairs], the first pair with exactly the same image (often the pair itself), -1 where the image is broken
    near: [pairs, 2], near-duplicates among those first ones
    test_exact, test_near: [pairs, 2], index of a pair and of one in the test set
    """

    first: Indices
    near: Pairs
    test_exact: Pairs
    test_near: Pairs

    def exact(self) -> Pairs:
        """Each pair that repeats an earlier image, and the first pair with it: [pairs, 2]."""
        repeats = np.flatnonzero((self.first >= 0) & (self.first != np.arange(len(self.first))))
        return np.stack([repeats, self.first[repeats]], axis=1)


def find_copies(scan: Scan, test: Scan | None = None, near: bool = True) -> Copies:
    """Exact and near-duplicates within a source, and between it and a test set."""
    _settle([scan] if test is None else [scan, test])
    first = _first_of(scan)
    own = np.flatnonzero(first == np.arange(len(first)))
    others = np.empty(0, np.int64) if test is None else np.unique(_first_of(test)[test.whole])
    test_exact = nothing = np.empty((0, 2), np.int64)
    hashes, thumbnails = scan.pairs["perceptual_hash"][own], scan.thumbnails[own]
    if test is not None:
        test_exact = common(scan.pairs["pixel_hash"], scan.whole, test.pairs["pixel_hash"], others)
        hashes = np.concatenate([hashes, test.pairs["perceptual_hash"][others]])
        thumbnails = np.concatenate([thumbnails, test.thumbnails[others]])
    if not near:
        return Copies(first, nothing, test_exact, nothing)
    found = near_duplicates(hashes, thumbnails)
    within = found[found[:, 1] < len(own)]
    across = found[(found[:, 0] < len(own)) & (found[:, 1] >= len(own))]
    across = np.stack([own[across[:, 0]], others[across[:, 1] - len(own)]], axis=1)
    return Copies(first, own[within], test_exact, _to_all(across, first, test_exact))


def common(values: NDArray[np.generic], of: Indices, others: NDArray[np.generic], other_of: Indices) -> Pairs:
    """Of the indices `of`, those whose value is also among `others`, with the first index of `other_of` that has it."""
    unique, where = np.unique(others[other_of], return_index=True)
    if not len(unique):
        return np.empty((0, 2), np.int64)
    at = np.searchsorted(unique, values[of]).clip(max=len(unique) - 1)
    found = unique[at] == values[of]
    return np.stack([of[found], other_of[where[at[found]]]], axis=1)


def _settle(scans: Sequence[Scan]) -> None:
    """Where files that differ are equal at the reduced scale they were looked at, hash all of their pixels."""
    pixels, files = (np.concatenate([scan.pairs[name][scan.whole] for scan in scans]) for name in _HASHES)
    order = np.lexsort((files, pixels))
    pixels, files = pixels[order], files[order]
    doubtful = np.unique(pixels[1:][(pixels[1:] == pixels[:-1]) & (files[1:] != files[:-1])])
    known: dict[int, int] = {}
    for scan in scans:
        for index in scan.whole[np.isin(scan.pairs["pixel_hash"][scan.whole], doubtful)].tolist():
            file = int(scan.pairs["data_hash"][index])
            if file not in known:
                pixel = decode_image(scan.source[index].image)
                known[file] = hash_bytes(b"%d %d " % pixel.shape[:2] + pixel.tobytes())
            scan.pairs["pixel_hash"][index] = known[file]


def _first_of(scan: Scan) -> Indices:
    first = np.full(len(scan.pairs), -1, np.int64)
    _, where, inverse = np.unique(scan.pairs["pixel_hash"][scan.whole], return_index=True, return_inverse=True)
    first[scan.whole] = scan.whole[where[inverse]]
    return first


def _to_all(across: Pairs, first: Indices, exact: Pairs) -> Pairs:
    """What is near one of the first pairs is near all of that image. What is in the test set exactly is left out."""
    if not len(across):
        return across
    own, where = np.unique(across[:, 0], return_index=True)
    at = np.searchsorted(own, first).clip(max=len(own) - 1)
    pairs = np.setdiff1d(np.flatnonzero(own[at] == first), exact[:, 0])
    return np.stack([pairs, across[where[at[pairs]], 1]], axis=1)
