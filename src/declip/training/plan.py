"""What the rules of `declip finetune` look at, and what they say: facts, choices, a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Speed:
    """What was timed: a step of `batch_size` pairs, and a held-out score; in seconds."""

    seconds_per_step: float
    seconds_per_score: float
    batch_size: int


@dataclass(frozen=True)
class Facts:
    """What the rules look at.

    joint: both towers come from one model; random: the towers that start at random, of ``image`` and ``text``
    layers: of each tower, where they are known
    image_size: of the image tower; any_size: whether it takes others too; batch_norms: whether it has such
    classes: how many classes' names would bring the towers together, as `model.image.classes` says
    views_alike: whether an image's views can be kept, as the recipe says
    embed_dim: width of the projections that come with the weights, None where there are none
    pairs, held_out: how many train, how many judge; splits: whether the held-out ones are taken from the user's pairs
    by_picture: whether they are few enough to be split by their pictures
    captions: of an image, on average; sides: share of them that name a side, None where they are in no language that
        the words are known of
    said: what the user or the recipe says, by path; the rules say nothing of these
    minutes, speed: for all, and what a few steps took; None where time does not matter
    passes: epochs of all layers that fit into the minutes, as `passes_in` says once; None where they were not timed
    pair_bytes: what a pair takes while a step computes its gradients, where all layers learn; None where not measured
    free_bytes: of memory; None where that is not known
    spent: seconds that are gone already
    """

    joint: bool
    pairs: int
    held_out: int
    captions: float = 1.0
    sides: float | None = None
    splits: bool = True
    by_picture: bool = True
    random: tuple[str, ...] = ()
    layers: Mapping[str, int] = field(default_factory=dict)
    image_size: int = 224
    any_size: bool = False
    batch_norms: bool = False
    classes: int = 0
    views_alike: bool = True
    embed_dim: int | None = None
    said: Mapping[str, Any] = field(default_factory=dict)
    minutes: float | None = None
    speed: Speed | None = None
    passes: float | None = None
    pair_bytes: float | None = None
    free_bytes: int | None = None
    spent: float = 0.0


@dataclass(frozen=True)
class Choice:
    """A field of the recipe by its path, its value, and why."""

    path: str
    value: Any
    reason: str

    @property
    def override(self) -> str:
        """As `load_recipe` takes it."""
        return override(self.path, self.value)


Plan = list[Choice]


def override(path: str, value: Any) -> str:
    """``path=value``, the value in TOML's words."""
    return f"{path}={'none' if value is None else json.dumps(value, ensure_ascii=False)}"
