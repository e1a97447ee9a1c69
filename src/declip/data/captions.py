"""Captions to batches of tokens, whole or with some of them hidden.

NumPy and plain Python: loader workers cut and mask captions without tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from declip.data.tokenizer import CLIP_TOKENS, SpecialTokens
from declip.errors import InputError

Tokens = NDArray[np.int64]  # [captions, longest]

NO_LABEL = -100  # cross_entropy's default ignore_index


def tokenize(texts: Sequence[Sequence[int]], context_length: int, special: SpecialTokens = CLIP_TOKENS) -> Tokens:
    """Ids of captions to ``[captions, longest]``: start, ids, end, then padding up to the longest caption only.

    A caption too long for `context_length` is cut, its end token stays. Raises InputError when not even start and end
    fit in.
    """
    return _rows(*_flat(_cut(texts, context_length, special)), special.start, special.end, special.pad)


def lengthen(tokens: Tokens, length: int, filler: int) -> Tokens:
    """``[captions, longest]`` filled up to ``[captions, length]``."""
    return np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])), constant_values=filler)


def tokenize_masked(
    texts: Sequence[Sequence[int]],
    context_length: int,
    share: float,
    rngs: np.random.Generator | Sequence[np.random.Generator],
    special: SpecialTokens = CLIP_TOKENS,
) -> tuple[Tokens, Tokens]:
    """As `tokenize`, with tokens hidden by `mask_tokens` after cutting: (tokens, labels), both ``[captions, longest]``.

    Labels are -100 at start, end and padding and wherever nothing is to be predicted. `rngs` is one generator for all
    captions or one for each.
    """
    cut = _cut(texts, context_length, special)
    ids, lengths = _flat(cut)
    if isinstance(rngs, np.random.Generator):
        rngs = [rngs] * len(cut)
    if len({id(rng.bit_generator) for rng in rngs}) == len(rngs) == len(cut):
        corrupted, labels = _mask_flat(ids, lengths, share, rngs, special)
    else:
        # A generator that serves several captions finishes one before it begins the next.
        masked = [mask_tokens(ids, rng, share, special) for ids, rng in zip(cut, rngs, strict=True)]
        corrupted, labels = (_flat([pair[which] for pair in masked])[0] for which in (0, 1))
    start, end = ((NO_LABEL,) * len(ids) for ids in (special.start, special.end))
    return (
        _rows(corrupted, lengths, special.start, special.end, special.pad),
        _rows(labels, lengths, start, end, NO_LABEL),
    )


def _cut(texts: Sequence[Sequence[int]], context_length: int, special: SpecialTokens) -> list[Sequence[int]]:
    around = len(special.start) + len(special.end)
    if context_length < around:
        raise InputError(
            f"context_length = {context_length} is too short: a start and an end token need {around} positions."
        )
    return [ids[: context_length - around] for ids in texts]


def _flat(texts: Sequence[Sequence[int]]) -> tuple[Tokens, Tokens]:
    """All ids one after the other ``[ids]``, and how many each caption has ``[captions]``."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    return np.fromiter(chain.from_iterable(texts), np.int64, int(lengths.sum())), lengths


def _rows(ids: Tokens, lengths: Tokens, start: tuple[int, ...], end: tuple[int, ...], padding: int) -> Tokens:
    longest = int(lengths.max(initial=0))
    rows = np.full((len(lengths), len(start) + longest + len(end)), padding, np.int64)
    rows[:, : len(start)] = start
    rows[:, len(start) : len(start) + longest][np.arange(longest) < lengths[:, None]] = ids
    if len(lengths):
        rows[np.arange(len(lengths))[:, None], len(start) + lengths[:, None] + np.arange(len(end))] = end
    return rows


def _mask_flat(
    ids: Tokens, lengths: Tokens, share: float, rngs: Sequence[np.random.Generator], special: SpecialTokens
) -> tuple[Tokens, Tokens]:
    """`mask_tokens` for all captions of a batch at once, with the same numbers: (corrupted ids, labels), both flat."""
    draws = np.empty(len(ids))
    ends = np.cumsum(lengths).tolist()
    for rng, first, last in zip(rngs, [0, *ends], ends, strict=False):
        rng.random(out=draws[first:last])
    places = np.flatnonzero(draws < share)
    hideable = (token not in special.never for token in ids[places].tolist())
    places = places[np.fromiter(hideable, np.bool_, len(places))]
    corrupted, labels = ids.copy(), np.full(len(ids), NO_LABEL, np.int64)
    labels[places] = ids[places]
    drawn = draws[places]
    corrupted[places[drawn < 0.8 * share]] = special.mask
    random = places[(drawn >= 0.8 * share) & (drawn < 0.9 * share)]
    owners = np.searchsorted(ends, random, side="right")
    for place, owner in zip(random.tolist(), owners.tolist(), strict=True):
        token = int(rngs[owner].integers(special.vocabulary))
        if token not in special.never:
            corrupted[place] = token
    return corrupted, labels


def mask_tokens(
    ids: Sequence[int], rng: np.random.Generator, share: float, special: SpecialTokens = CLIP_TOKENS
) -> tuple[list[int], list[int]]:
    """Hide a share of a caption's ids (without start and end token): (corrupted ids, labels).

    Each id is chosen with probability `share`; of the chosen, 80 % become the mask token, 10 % a random id, 10 % stay
    (BERT, Devlin et al. 2019, section 3.1). Labels hold the original id where one was chosen and -100 elsewhere.
    """
    corrupted, labels = list(ids), [NO_LABEL] * len(ids)
    for position, draw in enumerate(rng.random(len(ids)).tolist()):
        token = corrupted[position]
        if draw >= share or token in special.never:  # a caption may spell out "<end_of_text>"
            continue
        labels[position] = token
        if draw < 0.8 * share:
            corrupted[position] = special.mask
        elif draw < 0.9 * share:
            # Never a start, end or mask token. The reference draws those too; its random end token moves the pooling.
            drawn = int(rng.integers(special.vocabulary))
            corrupted[position] = token if drawn in special.never else drawn
    return corrupted, labels
