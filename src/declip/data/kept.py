"""What locked towers have made of pairs once, kept on disk: batches are made of it instead of pixels and tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from declip.data.sources import BrokenPair, Source

Pooled = NDArray[np.float16]


@dataclass(frozen=True)
class Kept:
    """Pooled features, mapped into memory; None of a tower that is not locked.

    images: [pairs, views, width] or, where pooling learns, [pairs, views, width, height, width] of a grid; NaN where an
        image could not be read
    texts: [captions, width], those of a pair one after the other, as `Images.caption_ends` counts them
    """

    images: Pooled | None = None
    texts: Pooled | None = None

    def views(self, source: Source, index: int, count: int, rng: np.random.Generator) -> Pooled:
        """Those of `count` different views, as long as there are so many; raises BrokenPair."""
        assert self.images is not None
        own = self.images[index]
        if np.isnan(own.flat[0]):
            raise BrokenPair(source.key(index), source.where(index), "its image cannot be read")
        chosen: Pooled = own[rng.permutation(len(own))[np.arange(count) % len(own)]]
        return chosen
