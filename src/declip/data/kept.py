"""What resting parts of towers have made of pairs once, kept on disk: batches are made of it instead of pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from declip.data.sources import BrokenPair, Source

States = NDArray[np.float16]


@dataclass(frozen=True)
class Kept:
    """What comes before all that learns, mapped into memory; None of a tower of which nothing is kept.

    images: [pairs, views, width], or tokens [pairs, views, tokens, width], or a grid [pairs, views, height, width,
        width of the tower]; NaN where an image could not be read
    texts: [captions, width], those of a pair one after the other, as `Images.caption_ends` counts them; or, with
        `text_ends`, [tokens of all captions, width]
    text_ends: where the tokens of each caption end: int64 [captions]
    teacher_images, teacher_texts: a teacher's embeddings, normalised: [pairs, width] and [captions, width]; NaN where
        an image could not be read
    """

    images: States | None = None
    texts: States | None = None
    text_ends: NDArray[np.int64] | None = None
    teacher_images: States | None = None
    teacher_texts: States | None = None

    @property
    def replaces_tokens(self) -> bool:
        """Whether a step needs no token ids."""
        return self.texts is not None and self.text_ends is None

    def views(self, source: Source, index: int, count: int, rng: np.random.Generator) -> States:
        """Those of `count` different views, as long as there are so many; raises BrokenPair."""
        assert self.images is not None
        own = self.images[index]
        if np.isnan(own[(0,) * own.ndim]):
            raise BrokenPair(source.key(index), source.where(index), "its image cannot be read")
        chosen: States = own[rng.permutation(len(own))[np.arange(count) % len(own)]]
        return chosen

    def captions(self, rows: list[int], longest: int) -> States:
        """Of some captions: [captions, width], or [captions, longest, width], zero behind the last token of each."""
        assert self.texts is not None
        if self.text_ends is None:
            return self.texts[rows]
        padded = np.zeros((len(rows), longest, self.texts.shape[1]), np.float16)
        for place, row in enumerate(rows):
            states = self.texts[int(self.text_ends[row - 1]) if row else 0 : int(self.text_ends[row])]
            padded[place, : len(states)] = states
        return padded
