"""What was found of one model on one set of pairs, and what it looks like as a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MISSED = 2**62
"""Rank of a query that could not be asked, as its image cannot be read."""

Interval = tuple[float, float]


@dataclass
class Judged:
    """One model, one task, one set of pairs.

    items: images judged, those that cannot be read among them; undecodable: how many these are; skipped: pairs with
        nothing that could be asked
    metrics: percent, but for median ranks (1 is best); intervals: of each the 95 % interval
    ranks: of every query, 0 where the right one stands first: int64 [queries], by what is asked for; empty where the
        figures are means over several draws of shots
    asked: int64 [queries], of retrieval the image of each caption that is a query, of a classification each image's
        class; choices: of a classification, among how many classes
    settings: what else has to be known, as a probe's strength
    """

    model: str
    data: str
    task: str
    items: int = 0
    skipped: int = 0
    undecodable: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    ranks: dict[str, Tensor] = field(default_factory=dict)
    asked: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    choices: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """What `declip evaluate --json` prints of it."""
        return {
            "model": self.model,
            "data": self.data,
            "task": self.task,
            **self.settings,
            "items": self.items,
            "skipped": self.skipped,
            "undecodable": self.undecodable,
            "metrics": self.metrics,
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
        }


@dataclass(frozen=True)
class Comparison:
    """Two models on the same queries: difference of one metric (first minus second), interval, two-sided p."""

    models: tuple[str, str]
    data: str
    task: str
    metric: str
    difference: float
    interval: Interval
    p: float

    def row(self) -> dict[str, Any]:
        return {**vars(self), "models": list(self.models), "interval": list(self.interval)}


def metric_name(name: str) -> str:
    """A metric as a column is headed: ``text_to_image_r5`` as ``text → image R@5``, ``top1`` as ``top-1``."""
    way, recall, k = name.rpartition("_r")
    if recall and k.isdigit():
        return f"{direction(way)} R@{k}"
    if name.endswith("_median_rank"):
        return f"{direction(name.removesuffix('_median_rank'))} median rank"
    return {"top1": "top-1", "top5": "top-5"}.get(name, name.replace("_", " "))


def direction(way: str) -> str:
    return way.replace("_to_", " → ")
