"""Images of a source, decoded once and kept where all fit in memory, on demand otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from declip.data.decode import Pixels, count_pixels, decode_image
from declip.data.images import View, draw_view, make_view, make_views
from declip.data.sources import BrokenPair, Source
from declip.errors import InputError
from declip.pairs import ImageViews

Read = TypeVar("Read")


@dataclass
class Images:
    """Decoded images of a source: kept in memory when all fit, decoded on demand otherwise."""

    source: Source
    kept: list[np.ndarray | BrokenPair] | None

    @cached_property
    def caption_ends(self) -> np.ndarray:
        """Where the captions of each pair end when all are counted one after the other: int64 [pairs]."""
        return np.cumsum([len(self.source.captions(index)) for index in range(len(self.source))])

    def get(self, index: int) -> np.ndarray:
        """uint8 [height, width, 3]; raises BrokenPair."""
        image = self.kept[index] if self.kept is not None else _of_pair(self.source, index, decode_image)
        if isinstance(image, BrokenPair):
            raise image
        return image

    def views(
        self,
        index: int,
        size: int | Sequence[int],
        options: Sequence[ImageViews],
        rng: np.random.Generator,
        crops_only: bool = False,
    ) -> list[tuple[Pixels, View]]:
        """Random views of an image, each uint8 [size, size, 3] and how it was drawn; raises BrokenPair.

        size: of all views, or of each; crops_only: make no more of a view than its crop.
        """
        if self.kept is None:
            return _of_pair(self.source, index, lambda data: make_views(data, size, options, rng, crops_only))
        image = self.get(index)
        drawn = [draw_view(image.shape[0], image.shape[1], view, rng) for view in options]
        sizes = [size] * len(drawn) if isinstance(size, int) else list(size)
        return [
            (make_view(image, own, View(view.box) if crops_only else view), view)
            for view, own in zip(drawn, sizes, strict=True)
        ]


def open_images(source: Source, limit_gb: float, broken_limit: float) -> Images:
    """Decode a source once when it fits in `limit_gb`; raises InputError when too many pairs are broken."""
    if len(source) * _mean_decoded_bytes(source) > limit_gb * 2**30:
        return Images(source, None)
    with ThreadPoolExecutor(2) as pool:
        kept = list(pool.map(lambda index: _try_decode(source, index), range(len(source))))
    broken = [image for image in kept if isinstance(image, BrokenPair)]
    check_broken(len(broken), broken[0] if broken else None, len(source), broken_limit)
    for pair in broken:
        print(f"skipped: {pair}", file=sys.stderr)
    return Images(source, kept)


def check_broken(count: int, first: BrokenPair | None, size: int, limit: float) -> None:
    """Raise InputError when more than `limit` of the pairs are broken."""
    if first is not None and count > limit * size:
        raise InputError(
            f"{count} of {size} pairs are broken, more than data.broken_limit = {limit:g} allows; the first: {first}."
        )


def _of_pair(source: Source, index: int, read: Callable[[bytes], Read]) -> Read:
    """What `read` makes of a pair's image; where this is a ValueError, the pair is broken."""
    pair = source[index]
    try:
        return read(pair.image)
    except ValueError as error:
        raise BrokenPair(pair.key, pair.where, str(error)) from None


def _try_decode(source: Source, index: int) -> np.ndarray | BrokenPair:
    try:
        return _of_pair(source, index, decode_image)
    except BrokenPair as error:
        return error


def _mean_decoded_bytes(source: Source, shards: int = 4, samples: int = 64) -> float:
    """Mean size of a decoded image, from the headers of a few in a few shards: a remote shard is fetched whole."""
    sizes = []
    chosen = np.unique(np.linspace(0, len(source.shards) - 2, shards).astype(int))
    for first, end in zip(source.shards[chosen], source.shards[chosen + 1], strict=True):
        for index in np.linspace(first, end - 1, min(samples // len(chosen), end - first)).astype(int):
            try:
                sizes.append(3 * count_pixels(source[int(index)].image))
            except ValueError:  # BrokenPair is one
                continue
    return float(np.mean(sizes)) if sizes else 0.0
