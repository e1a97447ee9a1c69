"""A look at the pairs: what the rules go by, and what a person should know before training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from declip.curation.scan import scan
from declip.data.sources import Source, Subset
from declip.data.tokenizer import CaptionTokenizer
from declip.errors import InputError
from declip.progress import Progress
from declip.training.pairs import UNKNOWN_AT_MOST, unknown_share

_SIDES = re.compile(r"\b(left|right|leftwards?|rightwards?|west|east|western|eastern|(counter|anti)?clockwise)\b", re.I)
_ENGLISH = re.compile(r"\b(a|an|the|of|in|on|with|and|is)\b", re.I)
LOOKED_AT = 2000
"""Pairs that are read for what is no more than an average."""


@dataclass(frozen=True)
class Look:
    """What a set of pairs is like.

    pairs: all; looked_at: how many of them, drawn evenly, the averages are of; broken: of these
    captions: of an image; tokens: of a caption, in the text tower's words; unknown: share of tokens that it knows not
    sides: share of captions that name left or right, east or west; None where hardly one is in English
    copies: share of all pairs whose picture is a copy of another's, None where they were not looked for
    side: median of the pictures' shorter sides in pixels; seen: side of what the image tower sees
    """

    pairs: int
    looked_at: int
    broken: int
    captions: float
    tokens: float
    unknown: float
    sides: float | None
    copies: float | None
    side: int
    seen: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self, held_out: int) -> list[tuple[str, str]]:
        """For people."""
        some = "" if self.looked_at == self.pairs else f" of the {self.looked_at:,} looked at"
        copies = "not looked for, they are too many" if self.copies is None else f"{self.copies:.1%} of the pairs"
        unknown = f"{self.unknown:.1%} of the tokens"
        if self.unknown > UNKNOWN_AT_MOST:
            unknown += ": choose a text tower of their language"
        return [
            ("pairs", f"{self.pairs:,}, of which {held_out:,} judge"),
            ("pictures that cannot be read", f"{self.broken:,}{some}"),
            ("captions an image", f"{self.captions:.1f}"),
            ("length of a caption", f"{self.tokens:.1f} tokens"),
            ("unknown words", unknown),
            ("copies of another picture", copies),
            ("shorter side of a picture", f"{self.side} px, the model sees {self.seen}"),
        ]


def sides_named(captions: Sequence[str]) -> float | None:
    """Share of captions that name a side, of which a mirrored picture would show the other.

    None where fewer than a fifth have one of the commonest English words: the words of other languages are not known.
    """
    english = sum(_ENGLISH.search(text) is not None for text in captions)
    if not captions or english < len(captions) / 5:
        return None
    return sum(_SIDES.search(text) is not None for text in captions) / len(captions)


def look(
    source: Source,
    groups: NDArray[np.int64] | None,
    tokenizer: CaptionTokenizer,
    image_size: int,
    workers: int,
    progress: Progress | None = None,
) -> Look:
    """Look at some of the pairs; groups: of those that show one picture, where they are known.

    Raises InputError where none of the pictures looked at can be read.
    """
    chosen = np.unique(np.linspace(0, len(source) - 1, min(len(source), LOOKED_AT)).astype(np.int64))
    seen = scan(Subset(source, chosen), workers, progress, "looking at pairs")
    whole = seen.pairs[seen.whole]
    if not len(whole):
        raise InputError(f"{source.name}: none of the {len(chosen):,} pictures that were looked at can be read.")
    captions = [text for index in chosen.tolist() for text in source.captions(index)]
    lengths = [len(tokenizer.encode(text)) for text in captions]
    copies = None
    if groups is not None:
        _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        copies = float((sizes[group] > 1).mean())
    return Look(
        pairs=len(source),
        looked_at=len(chosen),
        broken=len(chosen) - len(whole),
        captions=float(seen.pairs["captions"].mean()),
        tokens=float(np.mean(lengths)) if lengths else 0.0,
        unknown=unknown_share(source, tokenizer),
        sides=sides_named(captions),
        copies=copies,
        side=int(np.median(np.minimum(whole["width"], whole["height"]))),
        seen=image_size,
    )
