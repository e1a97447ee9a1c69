"""Text views that sample a pair's captions: several of them joined, or single ones (COSMOS, FLAIR and DreamLIP).

The pool is what a pair has: its captions, or the sentences of these. Every view draws for itself; the single views
share one draw, so that they repeat nothing as long as the pool lasts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_END_OF_SENTENCE = re.compile(r"(?<=[.!?;])\s+|[\n\r]+|</s>")


def sentences(captions: Sequence[str]) -> tuple[str, ...]:
    """The sentences of all captions, without their full stops; a caption of one sentence is that."""
    parts = (part.strip().rstrip(".;").rstrip() for text in captions for part in _END_OF_SENTENCE.split(text))
    return tuple(part for part in parts if part) or tuple(captions)


def joined(pool: Sequence[str], most: int, rng: np.random.Generator) -> str:
    """1 to `most` of the pool, as many as it has at most, in random order as one text (COSMOS, §3.1)."""
    count = int(rng.integers(1, min(most, len(pool)) + 1))
    return ". ".join(pool[place] for place in rng.permutation(len(pool))[:count])


def singles(pool: Sequence[str], count: int, rng: np.random.Generator) -> tuple[list[str], int]:
    """So many of the pool in random order, and how many of these, the first ones, are there for the first time.

    Of a smaller pool all are taken as often as they go in, then some once more.
    """
    rounds = [rng.permutation(len(pool)) for _ in range(-(-count // len(pool)))]
    return [pool[place] for place in np.concatenate(rounds)[:count]], min(count, len(pool))
