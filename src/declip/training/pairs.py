"""The pairs of a run: which train, which are held out, how many steps they make."""

from __future__ import annotations

import torch
from torch import Tensor

from declip.data.decoded import Images
from declip.data.sources import Source, joined, open_sources, split_holdout, take_fraction
from declip.data.tokenizer import CaptionTokenizer
from declip.errors import InputError
from declip.pairs import Data
from declip.recipe import Recipe

UNKNOWN_AT_MOST = 0.05
"""Share of unknown words in captions above which a run says so."""
_CAPTIONED = 2000  # pairs whose captions are looked at


def open_pairs(data: Data) -> tuple[Source, Source | None]:
    """The training pairs and the held-out pairs of a recipe."""
    if not data.train:
        raise InputError(
            "There is nothing to train on: say data.train=FILE (parquet or a caption table beside images)."
        )
    # With weights every source keeps pairs of its own, and is split by itself.
    named = [[spec] for spec in data.train] if data.weights else [data.train]
    parts: list[Source] = [open_sources(specs, data) for specs in named]
    held: Source | None = None
    if data.validation:
        held = open_sources(data.validation, data)
    elif data.holdout:
        splits = [split_holdout(part, data.holdout, seed=0) for part in parts]
        parts, held = [kept for kept, _ in splits], joined([out for _, out in splits])
    if data.fraction < 1:
        parts = [take_fraction(part, data.fraction, data.fraction_seed) for part in parts]
    pairs = joined(parts)
    return pairs, held if held is not None and len(held) > 1 else None


def used_tokens(recipe: Recipe, pairs: Source, tokenizer: CaptionTokenizer) -> Tensor | None:
    """The token ids that occur in the training captions, where a term of the recipe asks for them."""
    term = recipe.terms.masked_language
    if term is None or term.vocabulary == "all":
        return None
    captions = (caption for index in range(len(pairs)) for caption in pairs.captions(index))
    return torch.tensor(sorted({token for caption in captions for token in tokenizer.encode(caption)}))


def unknown_share(pairs: Source, tokenizer: CaptionTokenizer) -> float:
    """Which share of the captions' tokens the tokenizer knows no word for, by some of the pairs."""
    unknown = getattr(tokenizer, "unknown", None)
    if unknown is None:
        return 0.0
    step = max(1, len(pairs) // _CAPTIONED)
    tokens = [
        token
        for index in range(0, len(pairs), step)
        for caption in pairs.captions(index)[:1]
        for token in tokenizer.encode(caption)
    ]
    return tokens.count(unknown) / max(1, len(tokens))


def epoch_pairs(recipe: Recipe, images: Images) -> int:
    """Pairs of an epoch; with ``data.text.pool=each`` every caption is one."""
    return int(images.caption_ends[-1]) if recipe.data.text.pool == "each" else len(images.source)


def total_steps(recipe: Recipe, pairs: int) -> int:
    """Length of the run in steps; pairs: of an epoch."""
    seen = recipe.schedule.pairs_seen or recipe.schedule.epochs * pairs
    return max(1, round(seen / recipe.schedule.batch_size))
