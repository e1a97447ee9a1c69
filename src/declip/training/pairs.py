"""The pairs of a run: which train, which are held out, how many steps they make."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from declip.data.decoded import Images
from declip.data.sources import (
    BrokenPair,
    Source,
    Subset,
    Without,
    hold_out_groups,
    joined,
    open_sources,
    split_holdout,
    take_fraction,
)
from declip.data.sources.splits import BY_KEY
from declip.data.storage import Storage
from declip.data.tokenizer import CaptionTokenizer
from declip.errors import InputError
from declip.pairs import Data
from declip.progress import Progress
from declip.recipe import Recipe

UNKNOWN_AT_MOST = 0.05
"""Share of unknown words in captions above which a run says so."""
_IMAGES_READ = 100_000  # at most, to tell whether pairs are still the same
_HELD_OUT, _ASIDE = 0, 1  # seeds of what is held out, and of what is set aside
_CAPTIONED = 2000  # pairs whose captions are looked at


def open_pairs(data: Data) -> tuple[Source, Source | None]:
    """The training pairs and the held-out pairs of a recipe."""
    if not data.train:
        raise InputError(
            "There is nothing to train on: say data.train=FILE (parquet or a caption table beside images)."
        )
    parts = _parts(data)
    if data.set_aside:
        parts, _ = _split(parts, data, data.set_aside, _ASIDE)
    held: Source | None = None
    if data.validation:
        held = open_sources(data.validation, data)
    elif data.holdout:
        parts, held = _split(parts, data, data.holdout, _HELD_OUT)
    if data.fraction < 1:
        parts = [take_fraction(part, data.fraction, data.fraction_seed) for part in parts]
    pairs = joined(parts)
    return pairs, held if held is not None and len(held) > 1 else None


def pairs_set_aside(data: Data) -> Source:
    """The pairs that ``data.set_aside`` keeps out of a run; raises InputError where it keeps none."""
    if not data.set_aside:
        raise InputError("No pairs are set aside: say data.set_aside=0.1.")
    return _split(_parts(data), data, data.set_aside, _ASIDE)[1]


def _parts(data: Data) -> list[Source]:
    """All training pairs; with weights every source keeps pairs of its own, and a share of each is held out."""
    return [open_sources(specs, data) for specs in ([[spec] for spec in data.train] if data.weights else [data.train])]


def _split(parts: list[Source], data: Data, share: float, seed: int) -> tuple[list[Source], Source]:
    """What is left of each part, and a share of all; no key, or by picture no picture, is on both sides."""
    by_key = data.holdout_by == "key"
    chosen = _chosen_by_key(parts, share, seed) if by_key else _chosen_by_picture(parts, data, share, seed)
    for part, own in zip(parts, chosen, strict=True):
        if len(own) == len(part):
            raise InputError(f"All {len(part)} pairs of {part.name} would be held out: give data.validation.")
    pieces = list(zip(parts, chosen, strict=True))
    return [Without(part, own) for part, own in pieces], joined([Subset(part, own) for part, own in pieces if len(own)])


def _chosen_by_key(parts: list[Source], share: float, seed: int) -> list[NDArray[np.int64]]:
    """Indices of what is held out of each part: a share of it, and what has a key that is held out of another.

    Keys that are only row numbers say nothing of other parts, and of parts above BY_KEY not all keys are read.
    """
    held = [split_holdout(part, share, seed)[1] for part in parts]
    if len(parts) == 1:
        return [held[0].indices]
    out = {of.key(index) for part, of in zip(parts, held, strict=True) if part.named for index in range(len(of))}
    return [
        np.array([index for index in range(len(part)) if part.key(index) in out], np.int64)
        if part.named and len(part) <= BY_KEY
        else of.indices
        for part, of in zip(parts, held, strict=True)
    ]


def _chosen_by_picture(parts: list[Source], data: Data, share: float, seed: int) -> list[NDArray[np.int64]]:
    """As `_chosen_by_key`, of all parts together, copies of a picture on one side."""
    source = joined(parts)
    chosen = hold_out_groups(source, share, seed, groups_of_pictures(source, data))
    starts = np.cumsum([0, *(len(part) for part in parts)])
    ends = np.searchsorted(chosen, starts)
    return [chosen[ends[i] : ends[i + 1]] - starts[i] for i in range(len(parts))]


def groups_of_pictures(source: Source, data: Data, progress: Progress | None = None) -> NDArray[np.int64]:
    """Which pairs show one picture, as `curation.groups.picture_groups` says; kept in the cache folder.

    Raises InputError where there are more pairs than are split one by one.
    """
    from declip.curation.groups import picture_groups

    if len(source) > BY_KEY:
        raise InputError(
            f"data.holdout_by = picture looks at every picture, and {source.name} has {len(source):,} pairs: it is for "
            f"{BY_KEY:,} at most; leave it out, or give data.validation."
        )

    def fill(place: Path) -> None:
        found = picture_groups(source, data.workers, progress)
        with place.open("wb") as file:  # given a path, numpy adds an ending
            np.save(file, found)

    name = f"groups of pictures {digest_of_pairs(source, images=True)}"
    groups: NDArray[np.int64] = np.load(Storage.of(data).kept(name, fill, f"the copies in {source.name}"))
    return groups


def digest_of_pairs(source: Source, images: bool) -> str:
    """Of keys, captions and, where they count, images: whether pairs are still the same."""
    digest = hashlib.blake2b(digest_size=16)
    step = max(1, len(source) // _IMAGES_READ)
    for index in range(len(source)):
        digest.update("\0".join([source.key(index), *source.captions(index)]).encode("utf-8", "replace"))
        if images and index % step == 0:
            try:
                digest.update(hashlib.blake2b(source[index].image).digest())
            except BrokenPair:
                digest.update(b"broken")
    return digest.hexdigest()


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


def check_batch(recipe: Recipe, pairs: Source) -> None:
    """Raises InputError where a step has more pairs than there are."""
    if recipe.schedule.batch_size > len(pairs):
        raise InputError(
            f"schedule.batch_size = {recipe.schedule.batch_size} is larger than the training set of {len(pairs)} pairs."
        )


def epoch_pairs(recipe: Recipe, images: Images) -> int:
    """Pairs of an epoch; with ``data.text.pool=each`` every caption is one."""
    return int(images.caption_ends[-1]) if recipe.data.text.pool == "each" else len(images.source)


def total_steps(recipe: Recipe, pairs: int) -> int:
    """Length of the run in steps; pairs: of an epoch."""
    seen = recipe.schedule.pairs_seen or recipe.schedule.epochs * pairs
    return max(1, round(seen / recipe.schedule.batch_size))
