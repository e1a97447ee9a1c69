"""Efficiency factors: against curves whose factor is known, and against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from declip.compare.efficiency import Curve, efficiency, monotone, pairs_needed

PAIRS = (100, 200, 400, 800, 1600)


def flat(values: list[float], seeds: int = 1, items: int = 4) -> list[np.ndarray]:
    """Outcomes without any noise."""
    return [np.full((seeds, items), value) for value in values]


def noisy(values: list[float], seeds: int = 3, items: int = 500, seed: int = 0) -> list[np.ndarray]:
    """Hits and misses of items that are as hard in every cell, in percent."""
    rng = np.random.default_rng(seed)
    hardness = rng.uniform(size=items)
    return [100.0 * (rng.normal(hardness, 0.05, (seeds, items)) < value / 100) for value in values]


def at(factors, read_off: str, pairs: int):
    return next(each for each in factors if each.read_off == read_off and each.pairs == pairs)


def test_monotone_is_isotonic_regression() -> None:
    values = np.random.default_rng(1).normal(size=(50, 7))
    expected = [IsotonicRegression().fit_transform(range(7), row) for row in values]
    np.testing.assert_allclose(monotone(values), expected, atol=1e-12)
    np.testing.assert_allclose(monotone(values[0]), expected[0], atol=1e-12)


def test_a_method_that_needs_a_third_of_the_pairs_has_factor_three() -> None:
    """Quality on a line over the logarithm, shifted by log 3."""
    base = Curve(PAIRS, flat([10 * math.log(n) for n in PAIRS]))
    method = Curve(PAIRS, flat([10 * math.log(3 * n) for n in PAIRS]))
    factors = efficiency(base, method)
    for pairs in PAIRS[2:]:  # 3 x 100 lies below 400
        found = at(factors, "base", pairs)
        assert (found.kind, found.base_pairs) == ("exact", pytest.approx(pairs))
        assert (found.factor, found.method_pairs) == (pytest.approx(3), pytest.approx(pairs / 3))
        assert (found.low, found.high) == (pytest.approx(3), pytest.approx(3))  # nothing varies
    low = at(factors, "base", 200)
    assert (low.kind, low.factor, low.method_pairs) == ("more", pytest.approx(2.0), None)
    assert at(factors, "method", 400).factor == pytest.approx(3)
    top = at(factors, "method", 800)
    assert (top.kind, top.factor, top.base_pairs) == ("more", pytest.approx(2.0), None)
    assert (top.high, top.as_json()["high"]) == (math.inf, None)
    assert [each.read_off for each in factors] == ["base"] * 5 + ["method"] * 5


def test_a_worse_method_has_a_factor_below_one() -> None:
    base, method = Curve(PAIRS, flat([11, 21, 31, 41, 51])), Curve(PAIRS, flat([1, 11, 21, 31, 41]))
    factors = efficiency(base, method)
    assert at(factors, "base", 800).factor == pytest.approx(0.5)
    top = at(factors, "base", 1600)
    assert (top.kind, top.factor, top.low) == ("less", pytest.approx(1.0), 0.0)
    assert at(factors, "method", 200).factor == pytest.approx(0.5)


def test_curves_that_never_meet_say_so() -> None:
    higher, lower = Curve(PAIRS, flat([20, 21, 22, 23, 24])), Curve(PAIRS, flat([1, 2, 3, 4, 5]))
    worst = at(efficiency(lower, higher), "method", 1600)
    assert (worst.kind, worst.factor, worst.base_pairs) == ("more", pytest.approx(1.0), None)
    most = at(efficiency(lower, higher), "method", 100)
    assert (most.kind, most.factor) == ("more", pytest.approx(16.0))
    assert at(efficiency(lower, higher), "base", 1600).kind == "more"


def test_a_fall_is_evened_out_and_a_level_needs_the_fewest_pairs() -> None:
    quality = monotone(np.array([[1.0, 5.0, 3.0, 4.0, 8.0]]))
    np.testing.assert_allclose(quality, [[1, 4, 4, 4, 8]])
    needed = pairs_needed(PAIRS, quality, np.array([4.0]))
    assert (needed.pairs[0], needed.beyond[0]) == (pytest.approx(200), 0)
    assert pairs_needed(PAIRS, quality, np.array([6.0])).pairs[0] == pytest.approx(math.sqrt(800 * 1600))
    assert pairs_needed(PAIRS, quality, np.array([0.5])).beyond[0] == -1
    assert pairs_needed(PAIRS, quality, np.array([8.5])).beyond[0] == 1


def test_intervals_hold_what_was_drawn() -> None:
    """Curves of factor two, judged by hits and misses: about 95 of 100 intervals hold the two."""
    pairs = (100, 200, 400, 800)
    held = 0
    for seed in range(40):
        outcomes = noisy([20, 30, 40, 50, 60], seed=seed)
        base, method = Curve(pairs, outcomes[:4]), Curve(pairs, outcomes[1:])
        found = at(efficiency(base, method, resamples=200), "base", 800)
        held += found.low <= 2 <= found.high
        assert found.low > 1.2
        assert found.high < 4
    assert held >= 34


def test_intervals_narrow_with_items_and_with_seeds() -> None:
    def width(outcomes: list[np.ndarray]) -> float:
        found = at(efficiency(Curve(PAIRS[:4], outcomes[:4]), Curve(PAIRS[:4], outcomes[1:])), "base", 800)
        return found.high - found.low

    def by_seed(seeds: int) -> list[np.ndarray]:
        """Seeds differ by as much, however many there are; items do not."""
        return [each + np.linspace(-3, 3, seeds)[:, None] for each in flat([20, 30, 40, 50, 60], seeds)]

    assert width(noisy([20, 30, 40, 50, 60], items=2000)) < 0.7 * width(noisy([20, 30, 40, 50, 60], items=200))
    assert width(by_seed(16)) < 0.7 * width(by_seed(2))


def test_draws_are_means_of_drawn_seeds_and_items() -> None:
    """Against plain loops."""
    rng = np.random.default_rng(2)
    curve = Curve((10, 20), [rng.normal(size=(3, 5)), rng.normal(size=(2, 5))])
    weights = np.array([[0.2] * 5, [0.6, 0.4, 0, 0, 0]])
    drawn = curve.draws(weights, np.random.default_rng(7))
    again = np.random.default_rng(7)
    for point, outcomes in enumerate(curve.outcomes):
        chosen = again.multinomial(len(outcomes), [1 / len(outcomes)] * len(outcomes), size=2)
        for draw in range(2):
            expected = sum(
                chosen[draw, seed] / len(outcomes) * weights[draw, item] * outcomes[seed, item]
                for seed in range(len(outcomes))
                for item in range(5)
            )
            assert drawn[draw, point] == pytest.approx(expected)
    low, high = curve.intervals()[0]
    assert low < curve.quality()[0] < high


def test_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match="same items"):
        efficiency(Curve((1, 2), flat([1, 2])), Curve((1, 2), flat([1, 2], items=5)))
