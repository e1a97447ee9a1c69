"""Intervals of the figures of retrieval and zero-shot classification, and how far one model is above another."""

from __future__ import annotations

import torch
from torch import Tensor

from declip.evaluation.retrieval import RECALL_AT
from declip.evaluation.statistics import (
    RESAMPLES,
    Difference,
    Interval,
    class_mean_difference,
    class_mean_interval,
    mean_difference,
    mean_interval,
    median_interval,
)


def retrieval_intervals(
    ranks: dict[str, Tensor], image_of_text: Tensor, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """95 % intervals under the names and in the units of `retrieval_metrics`; images are drawn with their captions.

    ranks: what `retrieval_ranks` returns; image_of_text: int64 ``[texts]``, the image of each text that is a query.
    """
    found = {}
    for way, rank in ranks.items():
        groups = image_of_text if way == "text_to_image" else None
        for k in RECALL_AT:
            found[f"{way}_r{k}"] = mean_interval(_percent(rank < k), groups, resamples, seed=seed)
        found[f"{way}_median_rank"] = median_interval(rank + 1, groups, resamples, seed=seed)
    return found


def retrieval_differences(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], image_of_text: Tensor, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Difference]:
    """How far the recalls of one model lie above another's on the same pairs, in points; otherwise as above."""
    found = {}
    for way, rank in ours.items():
        groups = image_of_text if way == "text_to_image" else None
        for k in RECALL_AT:
            hits = _percent(rank < k), _percent(theirs[way] < k)
            found[f"{way}_r{k}"] = mean_difference(*hits, groups, resamples, seed=seed)
    return found


def zero_shot_intervals(
    ranks: Tensor, labels: Tensor, classes: int, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """95 % intervals under the names and in the units of `zero_shot_metrics`.

    ranks: int64 ``[images]``, what `zero_shot_ranks` returns; classes: among how many was chosen.
    """
    per_class = class_mean_interval(ranks < 1, labels, resamples, seed=seed)
    return {
        "top1": mean_interval(_percent(ranks < 1), None, resamples, seed=seed),
        "top5": mean_interval(_percent(ranks < min(5, classes)), None, resamples, seed=seed),
        "mean_per_class": Interval(*(100 * number for number in per_class)),
    }


def zero_shot_differences(
    ours: Tensor, theirs: Tensor, labels: Tensor, classes: int, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Difference]:
    """How far the accuracies of one model lie above another's on the same images, in points; otherwise as above."""
    top = {"top1": 1, "top5": min(5, classes)}
    value, low, high, p = class_mean_difference(ours < 1, theirs < 1, labels, resamples, seed=seed)
    return {
        **{
            name: mean_difference(_percent(ours < k), _percent(theirs < k), None, resamples, seed=seed)
            for name, k in top.items()
        },
        "mean_per_class": Difference(100 * value, 100 * low, 100 * high, p),
    }


def _percent(hits: Tensor) -> Tensor:
    return 100 * hits.to(torch.float64)
