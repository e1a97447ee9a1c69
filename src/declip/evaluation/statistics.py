"""How sure a figure is: bootstrap intervals, tests between two models on the same items, and means over seeds.

Intervals are percentile intervals of the bootstrap (Efron and Tibshirani 1993, chapter 13): the items are drawn anew
with replacement, and the interval holds the middle 95 % of the figures of such draws. Items with the same outcome are
counted, not drawn one by one: how often each outcome comes up is multinomial (binomial for hits and misses), which is
the same distribution at a cost that does not grow with the number of items.

Where all items have the same outcome the interval has no width: nothing in the sample says how it might be otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95

_NUMBERS_AT_ONCE = 2**22  # of drawn numbers that exist at once

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Interval(NamedTuple):
    """A figure and the ends of its interval, in the figure's own unit."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """How far a figure lies above another's, the ends of the interval, and the two-sided p of no difference."""

    value: float
    low: float
    high: float
    p: float


class OverSeeds(NamedTuple):
    """Mean of a figure over seeds, standard deviation of a single seed's, and the ends of the mean's interval."""

    mean: float
    deviation: float
    low: float
    high: float


def mean_interval(
    values: Tensor, groups: Tensor | None = None, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Interval of the mean of `values` ``[n]``, such as hits as 0 and 1.

    groups: int64 ``[n]``, items of the same number are drawn together (the captions of an image); the mean is then
    that of all items of the groups drawn. Few groups (under about 30) make the interval too narrow.
    Raises ValueError where there are no values, or not one group each.
    """
    outcomes, places = _numbers(values), _places(values, groups)
    draws = _mean_draws(outcomes, places, resamples, np.random.default_rng(seed))
    return Interval(float(outcomes.mean()), *_middle(draws, level))


def median_interval(
    values: Tensor, groups: Tensor | None = None, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Interval of the median of `values` ``[n]``; otherwise as `mean_interval`."""
    outcomes, places = _numbers(values), _places(values, groups)
    rng = np.random.default_rng(seed)
    in_order = np.sort(outcomes)
    if places is None:
        draws = _median_draws(in_order, resamples, rng)
    else:
        draws = _grouped_median_draws(in_order, places[np.argsort(outcomes)], resamples, rng)
    return Interval(float(np.median(outcomes)), *_middle(draws, level))


def class_mean_interval(
    hits: Tensor, labels: Tensor, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Interval of the mean over classes of the share of hits, bool ``[n]``, among a class's items.

    labels: int64 ``[n]``. Each class is drawn by itself, and of n items n - 1 are drawn, which makes the variance that
    of the figure also where classes are small (Rao and Wu 1988, section 2); a class of one item never varies.
    Raises ValueError as `mean_interval` does.
    """
    per_class = _class_counts(_numbers(hits.bool()), _places(hits, labels))
    draws = _class_mean_draws(*per_class, resamples, np.random.default_rng(seed))
    sizes, up, _ = per_class
    return Interval(float((up / sizes).mean()), *_middle(draws, level))


def mean_difference(
    ours: Tensor,
    theirs: Tensor,
    groups: Tensor | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Difference:
    """Paired bootstrap of the mean of `ours` minus the mean of `theirs`, both ``[n]``, on the same items.

    The same items are drawn for both. p is twice the share of draws on the other side of zero, which is below 0.05
    where the interval at 95 % leaves zero out; at least 2 / (resamples + 1).
    Raises ValueError where the two have not the same items, and as `mean_interval` does.
    """
    _check_same(ours, theirs)
    outcomes, places = _numbers(ours) - _numbers(theirs), _places(ours, groups)
    draws = _mean_draws(outcomes, places, resamples, np.random.default_rng(seed))
    return Difference(float(outcomes.mean()), *_middle(draws, level), _two_sided(draws))


def class_mean_difference(
    ours: Tensor, theirs: Tensor, labels: Tensor, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Difference:
    """As `mean_difference`, of the mean over classes of the share of hits, bool ``[n]``; labels: int64 ``[n]``."""
    _check_same(ours, theirs)
    per_class = _class_counts(_numbers(ours.bool()) - _numbers(theirs.bool()), _places(ours, labels))
    draws = _class_mean_draws(*per_class, resamples, np.random.default_rng(seed))
    sizes, up, down = per_class
    return Difference(float(((up - down) / sizes).mean()), *_middle(draws, level), _two_sided(draws))


def mcnemar(ours: Tensor, theirs: Tensor) -> float:
    """Two-sided p of McNemar's exact test (1947): do two models hit equally often, bool ``[n]``, on the same items?

    Of the items that only one of them hits, each should have half: twice the binomial tail, at most 1. Items count as
    independent: for the captions of an image, which are not, take `mean_difference` with groups.
    Raises ValueError where the two have not the same items.
    """
    _check_same(ours, theirs)
    ours, theirs = ours.bool(), theirs.bool()
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    n = only_ours + only_theirs
    k = torch.arange(min(only_ours, only_theirs) + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return min(1.0, 2 * math.exp(float(ways.logsumexp(0)) - n * math.log(2)))


def over_seeds(values: Sequence[float], level: float = LEVEL) -> OverSeeds:
    """Mean and standard deviation (n - 1) of a figure over seeds, and Student's interval of the mean.

    It says how a method does over its seeds on these test items; how sure the items are is the bootstrap's question.
    Raises ValueError of fewer than two values.
    """
    if len(values) < 2:
        raise ValueError("one seed says nothing about how seeds differ: give two values or more")
    numbers = np.asarray(values, np.float64)
    mean, deviation = float(numbers.mean()), float(numbers.std(ddof=1))
    reach = student_quantile(level, len(values) - 1) * deviation / math.sqrt(len(values))
    return OverSeeds(mean, deviation, mean - reach, mean + reach)


def student_quantile(level: float, freedom: int) -> float:
    """The t that Student's variable with so many degrees of freedom stays within, with probability `level`.

    Bisection of the closed form for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(freedom)
    for _ in range(100):
        angle = (low + high) / 2
        low, high = (angle, high) if _student_within(angle, freedom) < level else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _student_within(angle: float, freedom: int) -> float:
    cosine, sine, odd = math.cos(angle), math.sin(angle), freedom % 2
    term = total = (cosine if odd else 1.0) if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _check_same(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise ValueError(
            f"two models are compared on the same items, not {tuple(ours.shape)} and {tuple(theirs.shape)}"
        )


def _numbers(values: Tensor) -> Floats:
    if values.ndim != 1 or not len(values):
        raise ValueError(f"outcomes are one number an item, not {tuple(values.shape)}")
    numbers: Floats = values.detach().double().cpu().numpy()
    return numbers


def _places(values: Tensor, groups: Any) -> Any:
    """The groups counted from 0, or None."""
    if groups is None:
        return None
    if groups.shape != values.shape:
        raise ValueError(f"{len(values)} items need one group each, not {tuple(groups.shape)}")
    return np.unique(groups.cpu().numpy(), return_inverse=True)[1]


def _middle(draws: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _two_sided(draws: Floats) -> float:
    tails = (1 + int((draws <= 0).sum()), 1 + int((draws >= 0).sum()))
    return min(1.0, 2 * min(tails) / (1 + len(draws)))


def _steps(resamples: int, numbers: int) -> Iterator[int]:
    """How many resamples of so many numbers are made at once."""
    step = max(1, _NUMBERS_AT_ONCE // numbers)
    return (min(step, resamples - start) for start in range(0, resamples, step))


def _counts(cells: Ints, resamples: int, rng: np.random.Generator) -> Iterator[Ints]:
    """How often each cell comes up when as many items as there are come anew: ``[some resamples, cells]``."""
    total = int(cells.sum())
    for step in _steps(resamples, len(cells)):
        yield rng.multinomial(total, cells / total, size=step)


def _mean_draws(outcomes: Floats, places: Any, resamples: int, rng: np.random.Generator) -> Floats:
    if places is None:
        sums, cells = np.unique(outcomes, return_counts=True)
        sizes = np.ones(len(sums))
    else:
        groups = np.stack([np.bincount(places, weights=outcomes), np.bincount(places)], axis=1)
        (sums, sizes), cells = (found.T for found in np.unique(groups, axis=0, return_counts=True))
    return np.concatenate([(drawn @ sums) / (drawn @ sizes) for drawn in _counts(cells, resamples, rng)])


def _class_counts(outcomes: Floats, places: Any) -> tuple[Ints, Ints, Ints]:
    """Of each class the items, and how many are 1 and -1."""
    sizes = np.bincount(places)
    up, down = (np.bincount(places[outcomes == sign], minlength=len(sizes)) for sign in (1, -1))
    return sizes, up, down


def _class_mean_draws(sizes: Ints, up: Ints, down: Ints, resamples: int, rng: np.random.Generator) -> Floats:
    drawn = np.maximum(sizes - 1, 1)
    draws = []
    for step in _steps(resamples, len(sizes)):
        ups = rng.binomial(drawn, up / sizes, size=(step, len(sizes)))
        # What is not 1 is -1 with this chance: together they are multinomial.
        downs = rng.binomial(drawn - ups, down / np.maximum(sizes - up, 1))
        draws.append(((ups - downs) / drawn).mean(1))
    return np.concatenate(draws)


def _median_draws(in_order: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Of independent items: the k-th smallest of n uniform numbers is Beta(k, n + 1 - k), and says which item it is."""
    n = len(in_order)
    k = (n + 1) // 2
    share = rng.beta(k, n + 1 - k, size=resamples)
    lower = in_order[np.minimum((share * n).astype(np.int64), n - 1)]
    if n % 2:
        return lower
    # The next one is the smallest of the n - k that are uniform above.
    share += (1 - share) * (1 - rng.random(resamples) ** (1 / (n - k)))
    upper: Floats = in_order[np.minimum((share * n).astype(np.int64), n - 1)]
    return (lower + upper) / 2


def _grouped_median_draws(in_order: Floats, places: Ints, resamples: int, rng: np.random.Generator) -> Floats:
    """Of items in order of their values, each in its group."""
    draws = []
    groups = np.ones(int(places.max()) + 1, np.int64)
    for step in _steps(resamples, len(places)):
        drawn = rng.multinomial(len(groups), groups / len(groups), size=step)
        upto = drawn[:, places].cumsum(1)
        middles = ((upto[:, -1] - 1) // 2, upto[:, -1] // 2)
        lower, upper = (in_order[(upto <= middle[:, None]).sum(1)] for middle in middles)
        draws.append((lower + upper) / 2)
    return np.concatenate(draws)
