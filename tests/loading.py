"""Batches of a recipe, for tests."""

from __future__ import annotations

from collections.abc import Callable

import torch

from declip.data.batch import Batch
from declip.data.decoded import open_images
from declip.data.loader import BatchMaker, make_loader
from declip.data.sources import open_sources
from declip.data.tokenizer import EOT
from declip.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


def maker(recipe: Recipe, broken_limit: float = 1.0) -> BatchMaker:
    source = open_sources(recipe.data.train, recipe.data)
    return BatchMaker(open_images(source, recipe.data.cache_gb, broken_limit), recipe, 16, 77)


def batches(recipe: Recipe, first: int = 0, steps: int = 12, workers: int = 0) -> list[Batch]:
    return list(make_loader(maker(recipe), first, steps, workers))


def assert_same(one: Batch, other: Batch) -> None:
    assert one.text_views == other.text_views
    assert one.broken == other.broken
    for name in ("images", "tokens", "labels", "sample_ids", "filters"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)


def captions_of(batch: Batch, view: str) -> list[list[int]]:
    """The ids of each row without start, end and padding."""
    rows = batch.tokens[batch.text_views.index(view)].tolist()
    return [row[1 : row.index(EOT)] for row in rows]
