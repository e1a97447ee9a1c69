"""Sources: sequences of image-text pairs, whatever format they are stored in."""

from declip.data.sources.base import BrokenPair, Concatenation, Pair, Source, Subset, joined, whole_of
from declip.data.sources.opening import open_sources
from declip.data.sources.splits import Without, connected, hold_out_groups, split_holdout, take_fraction

__all__ = [
    "BrokenPair",
    "Concatenation",
    "Pair",
    "Source",
    "Subset",
    "Without",
    "connected",
    "hold_out_groups",
    "joined",
    "open_sources",
    "split_holdout",
    "take_fraction",
    "whole_of",
]
