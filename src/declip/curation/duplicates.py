"""Which images are the same picture: search by perceptual hash without comparing all with all, then a look at both."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]  # [images]
Pairs = NDArray[np.int64]  # [pairs, 2], the first index below the second, sorted, each pair once

DISTANCE = 7
"""Bits in which the hashes of two copies may differ: the most that a search in four bands finds without a miss."""

_BANDS = 4
_BUCKET = 256  # of equal bands, so many are compared with each: flat pictures, all of one hash, must not take hours
_AT_ONCE = 2**20  # candidates in memory


def near_duplicates(hashes: Hashes, thumbnails: NDArray[np.uint8]) -> Pairs:
    """Pairs of images that are one picture, recompressed, resized, slightly cropped, or with another brightness.

    hashes, thumbnails ``[images, THUMBNAIL]``: as `fingerprints.fingerprint` makes them.
    """
    found = [np.empty((0, 2), np.int64)]
    brightness = thumbnails[:, :256].mean(axis=1)
    for candidates in _candidates(hashes, brightness):
        found.append(candidates[same_picture(thumbnails[candidates[:, 0]], thumbnails[candidates[:, 1]])])
    return np.unique(np.concatenate(found), axis=0)


def similar_hashes(hashes: Hashes) -> Pairs:
    """Pairs whose hashes differ in at most DISTANCE bits.

    Exact as long as no more than 256 hashes share 16 of their bits. Of larger crowds each is compared with 256.
    """
    found = [np.empty((0, 2), np.int64), *_candidates(hashes, np.zeros(len(hashes)))]
    return np.unique(np.concatenate(found), axis=0)


def _candidates(hashes: Hashes, brightness: NDArray[np.floating]) -> Iterator[Pairs]:
    """Pairs within DISTANCE, some more than once.

    Of seven bits in four bands, one band has at most one. So it is enough to compare what is equal in a band, or would
    be with one of its bits turned: multi-index hashing (Norouzi et al. 2012, "Fast search in Hamming space with
    multi-index hashing", section 3).
    """
    for band in range(_BANDS):
        values = ((hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)).astype(np.int64)
        # Within a crowd, equal hashes stand together, of these the equally bright.
        order = np.lexsort((brightness, hashes, values))
        values, ordered = values[order], hashes[order]
        starts = np.searchsorted(values, np.arange(2**16 + 1))
        for turned in (0, *(1 << bit for bit in range(16))):
            others = values ^ turned
            first = np.arange(1, len(values) + 1) if turned == 0 else starts[others]
            counts = np.minimum(starts[others + 1] - first, _BUCKET)
            counts[others < values] = 0  # seen from the other side
            for low, high in _chunks(counts):
                left = np.repeat(np.arange(low, high), counts[low:high])
                ends = np.cumsum(counts[low:high])
                offset = np.repeat(first[low:high] - ends + counts[low:high], counts[low:high])
                right = offset + np.arange(len(left))
                near = np.bitwise_count(ordered[left] ^ ordered[right]) <= DISTANCE
                both = np.stack([order[left[near]], order[right[near]]], axis=1)
                both.sort(axis=1)
                yield both


def _chunks(counts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Stretches of items that together have about _AT_ONCE candidates."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.searchsorted(ends, np.arange(_AT_ONCE, total + _AT_ONCE, _AT_ONCE)) + 1
    edges = np.unique(np.concatenate([[0], cuts.clip(max=len(counts))]))
    yield from zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)


def same_picture(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether thumbnails ``[pairs, THUMBNAIL]`` show the same: bool [pairs].

    The grey levels may differ by brightness and contrast, and beside an edge, as where a border was cut off; the
    colours may not, so that a red heart stays another picture than a green one. The limits were chosen on copies of
    photos and on drawings that look much alike.
    """
    a, b = one.astype(np.float32), other.astype(np.float32)
    colours = np.abs(a[:, 256:] - b[:, 256:])
    levels = np.abs(a[:, :256] - b[:, :256])
    a, b = a[:, :256], b[:, :256]
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    spread, other_spread = a.std(axis=1), b.std(axis=1)
    low, high = np.minimum(spread, other_spread), np.maximum(spread, other_spread)
    a, b = a / np.maximum(spread, 1e-6)[:, None], b / np.maximum(other_spread, 1e-6)[:, None]
    alike = ((a * b).mean(axis=1) >= 0.92) & (low >= 0.6 * high)
    # A border cut off moves edges by less than half a cell. What changes where there is no edge is another picture.
    steps, apart = np.minimum(_steps(a), _steps(b)), np.abs(a - b)
    alike &= np.maximum(apart - 0.5 * steps - 0.3, 0).sum(axis=1) <= 0.5
    # So is what changes in a few cells alone: a smile is eight cells or fewer, a crop or a brightness shows all over.
    few = np.partition(apart, -8, axis=1)[:, -8:].sum(axis=1) > 0.22 * np.maximum(apart.sum(axis=1), 3)
    alike &= ~few | (np.maximum(apart - 0.35 * steps - 0.15, 0).sum(axis=1) <= 0.5)
    # Where there is next to no contrast, its pattern is noise and the level is what counts.
    flat = (levels.mean(axis=1) <= 2) & (levels.max(axis=1) <= 8)
    same = np.where(high < 4, flat, alike)
    return np.asarray(same & (colours.mean(axis=1) <= 8) & (colours.max(axis=1) <= 24))


def _steps(levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far the levels around each cell are apart: [pairs, 256], for levels of 16 x 16 cells."""
    padded = np.pad(levels.reshape(-1, 16, 16), ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = np.stack([padded[:, i : i + 16] for i in range(3)])
    highest, lowest = rows.max(axis=0), rows.min(axis=0)
    highest = np.stack([highest[:, :, i : i + 16] for i in range(3)]).max(axis=0)
    lowest = np.stack([lowest[:, :, i : i + 16] for i in range(3)]).min(axis=0)
    return np.asarray((highest - lowest).reshape(-1, 256))
