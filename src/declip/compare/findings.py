"""From finished cells to what they say: quality against pairs and compute, efficiency factors, an ablation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np

from declip.compare.efficiency import RESAMPLES, Curve, Factor, Floats, efficiency, item_weights
from declip.compare.grid import Cell, Method
from declip.compare.prepare import Prepared

Metric = Literal["mean", "r1", "r5", "r10"]
METRICS: dict[str, tuple[tuple[int, ...], str]] = {
    "mean": ((1, 5, 10), "mean recall at 1, 5 and 10, both ways"),
    "r1": ((1,), "recall at 1, mean of both ways"),
    "r5": ((5,), "recall at 5, mean of both ways"),
    "r10": ((10,), "recall at 10, mean of both ways"),
}
View = Literal["pairs seen", "compute", "best"]
VIEWS: dict[View, str] = {
    "pairs seen": "every method sees as many pairs",
    "compute": "no method spends more floating-point operations than the base",
    "best": "each method at the length that is best on held-out pairs",
}
_ROUNDING = 1.02  # runs are whole steps: this much more compute is the same


@dataclass(frozen=True)
class Ran:
    """A finished cell."""

    cell: Cell
    found: dict[str, Any]

    @property
    def seen(self) -> int:
        """Pairs that it saw: fewer than its cell says where it was stopped early."""
        return int(self.found["summary"]["pairs_seen"])

    @property
    def flops(self) -> float:
        return float(self.found["flops_per_pair"]) * self.seen

    @property
    def diverged(self) -> bool:
        return bool(self.found["status"] != "done")

    @property
    def held_out(self) -> float:
        """Of the weights that were kept and judged."""
        return kept_score(self.found)


@dataclass(frozen=True)
class Point:
    """A method at one fraction: the runs that count there, and those that have diverged, which do not."""

    fraction: Fraction
    pairs: int
    runs: list[Ran]
    diverged: int


@dataclass
class Line:
    """A method's points in one view of the grid on one judged set, fewest pairs first."""

    method: str
    judged: str
    view: View
    points: list[Point]
    curve: Curve


@dataclass
class Findings:
    lines: list[Line]
    factors: list[tuple[Line, list[Factor]]]  # of all methods but the base
    ablation: list[dict[str, Any]] = field(default_factory=list)

    def line(self, method: str, judged: str, view: View) -> Line | None:
        wanted = (method, judged, view)
        return next((line for line in self.lines if (line.method, line.judged, line.view) == wanted), None)


def kept_score(found: dict[str, Any]) -> float:
    """The held-out score of the weights that a cell has kept; below all where it has diverged."""
    return float(found["summary"]["held_out_score"]) if found["status"] == "done" else float("-inf")


def outcomes(found: dict[str, Any], judged: str, metric: str) -> Floats:
    """What each judged picture came to, in percent: [items].

    The mean of both ways: its own query, and the mean of the queries of its captions; each the share of the metric's
    cut-offs that its right answer is within.
    """
    own = found["judged"][judged]
    within = METRICS[metric][0]

    def hits(ranks: list[int]) -> Floats:
        share: Floats = 100.0 * np.mean([np.asarray(ranks) < k for k in within], axis=0)
        return share

    owner = np.asarray(own["image_of_text"])
    there, back = hits(own["ranks"]["text_to_image"]), hits(own["ranks"]["image_to_text"])
    return (np.bincount(owner, weights=there) / np.bincount(owner) + back) / 2


def chance(found: dict[str, Any], judged: str, metric: str) -> float:
    """What guessing comes to on average, in percent, as `outcomes` counts."""
    owner = np.asarray(found["judged"][judged]["image_of_text"])
    own, texts = np.bincount(owner), len(owner)
    there = np.mean([min(1.0, k / len(own)) for k in METRICS[metric][0]])
    cutoffs = [min(k, texts) for k in METRICS[metric][0]]  # none of an image's texts is among the first k of all
    missed = [math.comb(texts - int(count), k) / math.comb(texts, k) for k in cutoffs for count in own]
    return float(50 * (there + 1 - np.mean(missed)))


def find(prepared: Prepared, ran: Sequence[Ran], metric: str) -> Findings:
    """All that the cells of the grid say."""
    lines = []
    for judged in prepared.judged:
        for view in get_args(View):
            for method in prepared.methods:
                points = _points(prepared, ran, method.name, view)
                if points:
                    lines.append(_line(method.name, judged, view, points, metric))
    found = Findings(lines, [])
    for line in lines:
        base = found.line(prepared.base.name, line.judged, line.view)
        if base is not None and line is not base:
            found.factors.append((line, efficiency(base.curve, line.curve)))
    found.ablation = [
        row
        for judged in prepared.judged
        for fraction in prepared.pairs
        for row in _ablation(prepared, ran, judged, fraction, metric)
    ]
    return found


def _line(method: str, judged: str, view: View, points: list[Point], metric: str) -> Line:
    rows = [np.stack([outcomes(one.found, judged, metric) for one in point.runs]) for point in points]
    return Line(method, judged, view, points, Curve([point.pairs for point in points], rows))


def _points(prepared: Prepared, ran: Sequence[Ran], method: str, view: View) -> list[Point]:
    """At each fraction the runs of one length; where all have diverged there is no point."""
    found = []
    for fraction in sorted(prepared.pairs):
        own = [one for one in ran if (one.cell.method, one.cell.fraction) == (method, fraction)]
        chosen = _length(prepared, own, view)
        runs = [one for one in own if one.cell.seen == chosen]
        kept = [one for one in runs if not one.diverged]
        if kept:
            found.append(Point(fraction, prepared.pairs[fraction], kept, len(runs) - len(kept)))
    return found


def _length(prepared: Prepared, runs: Sequence[Ran], view: View) -> int | None:
    """Pairs seen by the runs that a view takes, chosen by their mean held-out score where it may choose."""
    lengths = {one.cell.seen for one in runs}
    if view == "pairs seen":
        return min(lengths, key=lambda seen: abs(seen - prepared.seen), default=None)
    if view == "compute":
        budget = _ROUNDING * prepared.flops[prepared.base.name] * prepared.seen
        lengths -= {one.cell.seen for one in runs if not one.diverged and one.flops > budget}

    def score(seen: int) -> float:
        scores = [one.held_out for one in runs if one.cell.seen == seen and not one.diverged]
        return statistics.mean(scores) if scores else float("-inf")

    return max(sorted(lengths), key=score, default=None)


def _ablation(
    prepared: Prepared, ran: Sequence[Ran], judged: str, fraction: Fraction, metric: str
) -> list[dict[str, Any]]:
    """Each variant beside its method, on the same items and seeds; without a quality where it has diverged."""
    rows: list[dict[str, Any]] = []
    by_method = {
        method.name: _points(prepared, [one for one in ran if one.cell.fraction == fraction], method.name, "pairs seen")
        for method in [*prepared.methods, *prepared.extras]
    }
    for variant in prepared.extras:
        own, whole = by_method[variant.name], by_method[variant.of or ""]
        if own and whole:
            rows.append(_against(variant, own[0], whole[0], judged, metric))
        elif whole and (lost := sum(one.cell.method == variant.name for one in ran if one.cell.fraction == fraction)):
            about = {"judged": judged, "method": variant.of, "variant": variant.name, "fraction": str(fraction)}
            rows.append({**about, "quality": None, "diverged": lost})
    return rows


def _against(variant: Method, own: Point, whole: Point, judged: str, metric: str) -> dict[str, Any]:
    """Seeds are drawn together, as judged pictures are: both have learnt from the same pairs with each."""
    own, whole = _of_same_seeds(own, whole), _of_same_seeds(whole, own)
    ours, theirs = (_line("", judged, "pairs seen", [point], metric).curve for point in (own, whole))
    weights = item_weights(ours.outcomes[0].shape[1], RESAMPLES, np.random.default_rng(0))
    drawn = [curve.draws(weights, np.random.default_rng(1)) for curve in (ours, theirs)]
    low, high = np.quantile((drawn[0] - drawn[1])[:, 0], [0.025, 0.975])
    return {
        "judged": judged,
        "method": variant.of,
        "variant": variant.name,
        "fraction": str(own.fraction),
        "quality": float(ours.quality()[0]),
        "of_method": float(theirs.quality()[0]),
        "difference": float(ours.quality()[0] - theirs.quality()[0]),
        "interval": [float(low), float(high)],
        "held_out": statistics.mean(one.held_out for one in own.runs),
        "held_out_of_method": statistics.mean(one.held_out for one in whole.runs),
        "seconds": statistics.mean(one.found["summary"]["seconds"] for one in own.runs),
        "seeds": len(own.runs),
        "diverged": own.diverged,
        "flops": statistics.mean(one.flops for one in own.runs) / statistics.mean(one.flops for one in whole.runs),
    }


def _of_same_seeds(point: Point, other: Point) -> Point:
    """Without the runs of seeds with which the other one's have diverged; with all where nothing would be left."""
    seeds = {one.cell.seed for one in other.runs}
    return replace(point, runs=[one for one in point.runs if one.cell.seed in seeds] or point.runs)


def line_json(line: Line) -> dict[str, Any]:
    quality, ends = line.curve.quality(), line.curve.intervals()
    return {
        "method": line.method,
        "judged": line.judged,
        "view": line.view,
        "points": [
            {
                "fraction": str(point.fraction),
                "pairs": point.pairs,
                "quality": float(quality[number]),
                "interval": [float(end) for end in ends[number]],
                "by_seed": {
                    one.cell.seed: float(line.curve.outcomes[number][i].mean()) for i, one in enumerate(point.runs)
                },
                "diverged": point.diverged,
                "pairs_seen": round(statistics.mean(one.seen for one in point.runs)),
                "flops": statistics.mean(one.flops for one in point.runs),
                "seconds": statistics.mean(one.found["summary"]["seconds"] for one in point.runs),
                "rate": point.runs[0].cell.rate,
                **_learning(point.runs),
            }
            for number, point in enumerate(line.points)
        ],
    }


def _learning(runs: Sequence[Ran]) -> dict[str, Any]:
    """How runs went: the held-out score, when it was best, how much of it was left at the end, neighbours found."""
    best = [max(one.found["held_out"], key=lambda row: row["score"]) for one in runs]
    last = [one.found["held_out"][-1] for one in runs]
    matches = [
        row["neighbour_matches"]
        for one in runs
        for row in one.found["losses"][len(one.found["losses"]) // 2 :]
        if row.get("neighbour_matches") is not None
    ]
    return {
        "held_out": statistics.mean(row["score"] for row in best),
        "best_at": statistics.mean(row["pairs"] / end["pairs"] for row, end in zip(best, last, strict=True)),
        "last_of_best": statistics.mean(
            end["score"] / row["score"] if row["score"] else 1.0 for row, end in zip(best, last, strict=True)
        ),
        **({"neighbour_matches": statistics.mean(matches)} if matches else {}),
    }
