"""How many times more pairs a base method needs for the same quality: the horizontal distance of two curves.

A curve says what a method reaches with how many pairs. More pairs are never worse than fewer, so noise is evened out by
isotonic regression before anything is read off, and what lies between two measured points is on a line over the
logarithm of the pairs. Intervals are percentile intervals of a bootstrap over seeds, which differ from cell to cell,
and over judged items, which are the same in all cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Kind = Literal["exact", "more", "less", "unknown"]

RESAMPLES, LEVEL = 1000, 0.95
_SAME = 1e-9  # two qualities this near are one: a level is read off the curve that it is looked up on


@dataclass(frozen=True)
class Curve:
    """What a method reaches.

    pairs: how many it learnt from, rising; outcomes: for each of these, what every judged item came to with every seed,
        in percent: [seeds, items], of at least one seed
    """

    pairs: Sequence[int]
    outcomes: Sequence[Floats]

    def quality(self) -> Floats:
        """The mean at each number of pairs: [points]. It may fall where seeds or items are few."""
        return np.array([each.mean() for each in self.outcomes])

    def intervals(self, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> Floats:
        """The ends of each point's interval: [points, 2]."""
        rng = np.random.default_rng(seed)
        draws = self.draws(item_weights(self.outcomes[0].shape[1], resamples, rng), rng)
        return np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0).T

    def draws(self, weights: Floats, rng: np.random.Generator) -> Floats:
        """Each point's mean with the items drawn anew as `weights` [resamples, items] say, and seeds by `rng`.

        [resamples, points]
        """
        columns = []
        for outcomes in self.outcomes:
            by_seed = weights @ outcomes.T
            seeds = len(outcomes)
            chosen = rng.multinomial(seeds, [1 / seeds] * seeds, size=len(weights)) / seeds
            columns.append((by_seed * chosen).sum(1))
        return np.stack(columns, axis=1)


@dataclass(frozen=True)
class Factor:
    """Base pairs over a method's pairs at one quality, in percent.

    read_off: whose point the quality is that of, and with how many pairs
    base_pairs, method_pairs: the fewest that are enough; None where a method is above that with its fewest, or never
        gets there
    factor: more: at least so much, as the base never gets there, or the method needs fewer pairs than were tried; less:
        at most so much; unknown: both are above with their fewest pairs, or below with all, and factor is None
    low, high: ends of the interval; 0 and infinity where draws leave it open
    """

    read_off: Literal["base", "method"]
    pairs: int
    quality: float
    base_pairs: float | None
    method_pairs: float | None
    kind: Kind
    factor: float | None
    low: float
    high: float

    def as_json(self) -> dict[str, Any]:
        return {name: None if value == math.inf else value for name, value in vars(self).items()}


class _Needed(NamedTuple):
    """Pairs that a curve needs [resamples], and where these are bounds: -1 it needs fewer, 1 it needs more."""

    pairs: Floats
    beyond: Ints


def item_weights(items: int, resamples: int, rng: np.random.Generator) -> Floats:
    """Shares of the items in draws of as many with replacement: [resamples, items]."""
    shares: Floats = rng.multinomial(items, np.full(items, 1 / items), size=resamples) / items
    return shares


def monotone(values: Floats) -> Floats:
    """The non-decreasing values nearest to `values` [..., points] in the sum of squares (isotonic regression).

    By its min-max formula, max over i ≤ k of the min over j ≥ k of the mean of i … j (Barlow et al. 1972, theorem 1.4).
    """
    points = values.shape[-1]
    sums = np.concatenate([np.zeros((*values.shape[:-1], 1)), values.cumsum(-1)], axis=-1)
    first, last = np.arange(points)[:, None], np.arange(points)[None]
    means = (sums[..., None, 1:] - sums[..., :-1, None]) / np.maximum(last - first + 1, 1)
    lowest = np.minimum.accumulate(np.where(first <= last, means, np.inf)[..., ::-1], axis=-1)[..., ::-1]
    return np.maximum.accumulate(np.where(first <= last, lowest, -np.inf), axis=-2)[..., range(points), range(points)]


def pairs_needed(pairs: Sequence[int], quality: Floats, level: Floats) -> _Needed:
    """The fewest pairs with which monotone curves [resamples, points] are at `level` [resamples]."""
    logs, wanted = np.log(np.asarray(pairs, np.float64)), level[:, None] - _SAME
    above = (quality < wanted).sum(1)  # the first point that is not below
    row, upper = np.arange(len(quality)), np.minimum(above, len(pairs) - 1)
    lower = np.maximum(upper - 1, 0)
    low, high = quality[row, lower], quality[row, upper]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(high > low, (level - low) / (high - low), 1.0)
    found = np.exp(logs[lower] + np.clip(share, 0, 1) * (logs[upper] - logs[lower]))
    beyond = np.where(above == len(pairs), 1, np.where(quality[:, 0] > level + _SAME, -1, 0))
    return _Needed(np.where(beyond > 0, pairs[-1], np.where(beyond < 0, pairs[0], found)), beyond)


def efficiency(
    base: Curve, method: Curve, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> list[Factor]:
    """The factor at the quality of every point of both curves, the base's first.

    The judged items are the same in all cells, and are drawn together; the quality is read off anew in every draw.
    Raises ValueError where the curves were not judged on equally many items.
    """
    items = {each.shape[1] for each in (*base.outcomes, *method.outcomes)}
    if len(items) != 1:
        raise ValueError(f"both methods are judged on the same items, not on {sorted(items)}")
    rng = np.random.default_rng(seed)
    weights = item_weights(items.pop(), resamples, rng)
    drawn = [np.concatenate([c.quality()[None], c.draws(weights, rng)]) for c in (base, method)]
    curves = [monotone(each) for each in drawn]
    found = []
    for which, curve in (("base", base), ("method", method)):
        for point, pairs in enumerate(curve.pairs):
            wanted = curves[which == "method"][:, point]
            of_base = pairs_needed(base.pairs, curves[0], wanted)
            of_method = pairs_needed(method.pairs, curves[1], wanted)
            found.append(_factor(which, pairs, float(wanted[0]), of_base, of_method, level))  # type: ignore[arg-type]
    return found


def _factor(
    which: Literal["base", "method"], pairs: int, quality: float, base: _Needed, method: _Needed, level: float
) -> Factor:
    """Of the first row as measured, of the others as drawn."""
    ratios, beyond = base.pairs / method.pairs, base.beyond - method.beyond
    unknown = (base.beyond == method.beyond) & (base.beyond != 0)
    # A draw that gives a bound alone is as far as that bound on the side it closes, and endless on the other.
    lows = np.where(unknown | (beyond < 0), 0.0, ratios)[1:]
    highs = np.where(unknown | (beyond > 0), np.inf, ratios)[1:]
    kind: Kind = "unknown" if unknown[0] else "more" if beyond[0] > 0 else "less" if beyond[0] < 0 else "exact"
    return Factor(
        which,
        pairs,
        quality,
        None if base.beyond[0] else float(base.pairs[0]),
        None if method.beyond[0] else float(method.pairs[0]),
        kind,
        None if kind == "unknown" else float(ratios[0]),
        float(np.quantile(lows, (1 - level) / 2, method="lower")),
        float(np.quantile(highs, (1 + level) / 2, method="higher")),
    )
