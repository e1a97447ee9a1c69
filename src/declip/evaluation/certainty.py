"""Intervals of what was judged, and whether one model is ahead of another on the same items."""

from __future__ import annotations

import torch
from torch import Tensor

from declip.evaluation.judged import Comparison, Interval, Judged
from declip.evaluation.statistics import (
    Difference,
    class_mean_difference,
    class_mean_interval,
    mcnemar,
    mean_difference,
    mean_interval,
    median_interval,
)

_WITHIN = {"top1": 1, "top5": 5}


def add_intervals(judged: Judged, seed: int = 0) -> None:
    """The 95 % interval of every metric. An image and its captions are drawn together; median ranks are counted from 1.

    Metrics that are no mean of ranks, as a few-shot probe's over draws of shots, are left as they are.
    """
    for metric in judged.metrics:
        if metric in judged.intervals:
            continue
        if metric.endswith("_median_rank"):
            way = metric.removesuffix("_median_rank")
            found = median_interval(judged.ranks[way], judged.units[way], seed=seed)
            judged.intervals[metric] = (1 + found.low, 1 + found.high)
            continue
        hits, units = _hits(judged, metric)
        if metric == "mean_per_class":
            assert judged.classes is not None
            found = class_mean_interval(hits, judged.classes, seed=seed)
        else:
            found = mean_interval(hits, units, seed=seed)
        judged.intervals[metric] = (100 * found.low, 100 * found.high)


def _hits(judged: Judged, metric: str) -> tuple[Tensor, Tensor | None]:
    """Whether each query was a hit, bool [queries], and what is drawn together: int64 [queries], or nothing."""
    way, _, k = metric.rpartition("_r")
    if way in judged.ranks:
        units = judged.units[way]
        return judged.ranks[way] < int(k), None if len(units.unique()) == len(units) else units
    return judged.ranks["class"] < _WITHIN.get(metric, 1), None


def compare(ours: Judged, theirs: Judged, metric: str, seed: int = 0) -> Comparison:
    """The difference of a metric between two models on the same queries.

    p is McNemar's where every item is one query of its own, and the paired bootstrap's elsewhere.
    """
    (one, units), (other, _) = _hits(ours, metric), _hits(theirs, metric)
    if metric == "mean_per_class":
        assert ours.classes is not None
        found = class_mean_difference(one, other, ours.classes, seed=seed)
        p = found.p
    else:
        found = mean_difference(one.float(), other.float(), units, seed=seed)
        p = mcnemar(one, other) if units is None else found.p
    return Comparison((ours.model, theirs.model), ours.data, ours.task, metric, 100 * found.value, _percent(found), p)


def _percent(found: Difference) -> Interval:
    return (100 * found.low, 100 * found.high)


def main_metrics(judged: Judged, published: str) -> list[str]:
    """The metrics that models are compared by: recall at 1 both ways, or the set's published accuracy."""
    if judged.task == "retrieval":
        return ["text_to_image_r1", "image_to_text_r1"]
    return [published if published in judged.metrics else "top1"]


def same_queries(ours: Judged, theirs: Judged) -> bool:
    """Whether two models were asked the same: the same set and task, and the same images in the same order."""
    return (
        (ours.data, ours.task, ours.settings.get("shots")) == (theirs.data, theirs.task, theirs.settings.get("shots"))
        and ours.ranks.keys() == theirs.ranks.keys()
        and all(len(ours.ranks[way]) == len(theirs.ranks[way]) for way in ours.ranks)
        and all(torch.equal(ours.units[way], theirs.units[way]) for way in ours.units)
    )
