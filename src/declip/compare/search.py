"""Each method's learning rate, from a small search at the smallest and the largest fraction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from declip.compare.findings import kept_score
from declip.compare.grid import Cell, Method, rate_between
from declip.compare.prepare import Prepared

_FURTHER = 2  # times that a search goes on where the best rate is the outermost

Run = Callable[[Sequence[Cell]], dict[str, dict[str, Any]]]
Rates = dict[str, dict[Fraction, dict[float, float]]]
"""Held-out score of the weights kept, by method, fraction and factor on the recipe's rates."""


def search_rates(prepared: Prepared, run: Run) -> Rates:
    """Scores of all rates tried. Those of all methods run side by side; where the outermost is best, one more is tried.

    Where every rate has diverged, none is better than another: the lowest is taken, and shown to diverge.
    """
    tried = tuple(prepared.asked.rates)
    wanted = {(m.name, fraction): list(tried) for m in prepared.methods for fraction in prepared.searched}
    scores: Rates = {m.name: {fraction: {} for fraction in prepared.searched} for m in prepared.methods}
    if len(tried) == 1:
        return {name: {fraction: {tried[0]: 0.0} for fraction in of} for name, of in scores.items()}
    by_name = {method.name: method for method in prepared.methods}
    for _ in range(1 + _FURTHER):
        cells = {
            (name, fraction, rate): prepared.search(by_name[name], fraction, rate)
            for (name, fraction), rates in wanted.items()
            for rate in rates
        }
        found = run(list(cells.values())) if cells else {}
        for (name, fraction, rate), cell in cells.items():
            scores[name][fraction][rate] = kept_score(found[cell.key])
        wanted = {
            (name, fraction): [further]
            for name, of in scores.items()
            for fraction, own in of.items()
            if (further := _outside(own)) is not None
        }
    return scores


def _outside(scores: dict[float, float]) -> float | None:
    """The next rate beyond the best, where that is the lowest or the highest tried."""
    best = max(scores, key=scores.__getitem__)
    rates = sorted(scores)
    if scores[best] == float("-inf") or len(rates) < 2:
        return None
    if best == rates[-1]:
        return best * best / rates[-2]
    return best * best / rates[1] if best == rates[0] else None


def rate_of(prepared: Prepared, rates: Rates, method: Method, fraction: Fraction) -> float:
    """The factor of a method, or of that which it is a variant of, at a fraction."""
    own = rates[method.of or method.name]
    small, large = ((f, max(own[f], key=own[f].__getitem__)) for f in prepared.searched)
    return float(f"{rate_between(small, large, fraction):.3g}")
