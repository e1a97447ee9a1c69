"""Intervals of what was judged, and whether one model is ahead of another on the same items."""

from __future__ import annotations

import torch

from declip.evaluation.intervals import (
    retrieval_differences,
    retrieval_intervals,
    zero_shot_differences,
    zero_shot_intervals,
)
from declip.evaluation.judged import Comparison, Judged
from declip.evaluation.statistics import mcnemar


def add_intervals(judged: Judged, seed: int = 0) -> None:
    """The 95 % interval of every metric; an image and its captions are drawn together."""
    if not judged.choices:
        found = retrieval_intervals(judged.ranks, judged.asked, seed=seed)
    else:
        found = zero_shot_intervals(judged.ranks["class"], judged.asked, judged.choices, seed=seed)
    judged.intervals = {name: (interval.low, interval.high) for name, interval in found.items()}


def compare(ours: Judged, theirs: Judged, published: str, seed: int = 0) -> list[Comparison]:
    """How far one model is ahead of another on the same queries: recall at 1 both ways, or the published accuracy.

    p is McNemar's where the figure is the share of images that are right, and the paired bootstrap's elsewhere.
    """
    if not ours.choices:
        found = retrieval_differences(ours.ranks, theirs.ranks, ours.asked, seed=seed)
        names = ["text_to_image_r1", "image_to_text_r1"]
    else:
        both = ours.ranks["class"], theirs.ranks["class"]
        found = zero_shot_differences(*both, ours.asked, ours.choices, seed=seed)
        names = [published if published in found else "top1"]
        if names == ["top1"]:
            found["top1"] = found["top1"]._replace(p=mcnemar(both[0] < 1, both[1] < 1))
    return [
        Comparison((ours.model, theirs.model), ours.data, ours.task, name, value, (low, high), p)
        for name in names
        for value, low, high, p in [found[name]]
    ]


def same_queries(ours: Judged, theirs: Judged) -> bool:
    """Whether two models were asked the same: the same set and task, and the same images in the same order."""
    return (
        (ours.data, ours.task, ours.settings.get("shots")) == (theirs.data, theirs.task, theirs.settings.get("shots"))
        and ours.ranks.keys() == theirs.ranks.keys() != set()
        and torch.equal(ours.asked, theirs.asked)
    )
