"""Intervals that contain the truth as often as they say, and tests that err as often as they may."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from declip.evaluation import statistics
from declip.evaluation.statistics import (
    class_mean_difference,
    class_mean_interval,
    mcnemar,
    mean_difference,
    mean_interval,
    median_interval,
    over_seeds,
    student_quantile,
)

RUNS = 400
# 95 % of 400 intervals are 380, give or take 4.4; three times that, and a little for the percentile's own error.
COVERED = (0.91, 0.985)


def coverage(truth: float, intervals: list[statistics.Interval]) -> float:
    return sum(found.low <= truth <= found.high for found in intervals) / len(intervals)


def test_intervals_of_hits_contain_the_truth() -> None:
    rng = np.random.default_rng(0)
    samples = [torch.from_numpy(rng.random(300) < 0.3) for _ in range(RUNS)]
    intervals = [mean_interval(hits, seed=run) for run, hits in enumerate(samples)]
    assert COVERED[0] <= coverage(0.3, intervals) <= COVERED[1]
    assert coverage(0.35, intervals) < 0.7  # the test can fail


def captions(rng: np.random.Generator, images: int = 100) -> tuple[Tensor, Tensor]:
    """Five captions an image that are mostly hit together; half of all are hits."""
    image = rng.beta(0.3, 0.3, size=images).repeat(5)
    return torch.from_numpy(rng.random(5 * images) < image), torch.arange(images).repeat_interleave(5)


def test_intervals_of_captions_need_their_groups() -> None:
    rng = np.random.default_rng(1)
    samples = [captions(rng) for _ in range(RUNS)]
    together = [mean_interval(hits, groups, seed=run) for run, (hits, groups) in enumerate(samples)]
    alone = [mean_interval(hits, seed=run) for run, (hits, _) in enumerate(samples)]
    assert COVERED[0] <= coverage(0.5, together) <= COVERED[1]
    assert coverage(0.5, alone) < 0.85


@pytest.mark.parametrize("n", [100, 101])
def test_intervals_of_medians_contain_the_truth(n: int) -> None:
    rng = np.random.default_rng(2)
    intervals = [median_interval(torch.from_numpy(rng.exponential(size=n)), seed=run) for run in range(RUNS)]
    assert COVERED[0] <= coverage(math.log(2), intervals) <= COVERED[1]


def test_intervals_of_grouped_medians_contain_the_truth() -> None:
    rng = np.random.default_rng(3)
    groups = torch.arange(60).repeat_interleave(3)
    intervals = []
    for run in range(RUNS):
        values = torch.from_numpy(rng.normal(size=60)).repeat_interleave(3) + torch.from_numpy(rng.normal(size=180)) / 2
        intervals.append(median_interval(values, groups, resamples=500, seed=run))
    assert COVERED[0] <= coverage(0.0, intervals) <= COVERED[1]


@pytest.mark.parametrize("size", [3, 40])
def test_intervals_of_class_means_contain_the_truth(size: int) -> None:
    rng = np.random.default_rng(4)
    shares, labels = np.linspace(0.1, 0.9, 30), torch.arange(30).repeat_interleave(size)
    intervals = [
        class_mean_interval(torch.from_numpy(rng.random(30 * size) < shares.repeat(size)), labels, seed=run)
        for run in range(RUNS)
    ]
    assert COVERED[0] <= coverage(0.5, intervals) <= COVERED[1]


def naive_draws(statistic: object, groups: Tensor, resamples: int = 4000) -> np.ndarray:
    """The definition: draw groups with replacement, and take the statistic of all their items."""
    rng = np.random.default_rng(5)
    members = [np.flatnonzero(groups.numpy() == group) for group in np.unique(groups.numpy())]
    draws = []
    for _ in range(resamples):
        drawn = np.concatenate([members[group] for group in rng.integers(len(members), size=len(members))])
        draws.append(statistic(drawn))  # type: ignore[operator]
    return np.array(draws)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("n", [50, 51])
def test_like_drawing_the_items_one_by_one(grouped: bool, n: int) -> None:
    rng = np.random.default_rng(6)
    values = torch.from_numpy(rng.integers(0, 40, size=n)).double()
    groups = torch.from_numpy(rng.integers(0, 20, size=n)) if grouped else torch.arange(n)
    # A mean moves in small steps, the median from one whole number to the next.
    for interval, statistic, error in ((mean_interval, np.mean, 0.4), (median_interval, np.median, 1.01)):
        naive = naive_draws(lambda drawn, of=statistic: of(values.numpy()[drawn]), groups)
        found = interval(values, groups if grouped else None, resamples=4000)
        assert found.value == pytest.approx(float(statistic(values.numpy())))
        assert (found.low, found.high) == pytest.approx(np.quantile(naive, [0.025, 0.975]), abs=error)


def test_class_means_are_drawn_with_the_variance_of_the_figure() -> None:
    """Unlike n draws of n, whose variance is short of it by a share of 1 / n."""
    hits, labels = torch.tensor([1, 0, 1, 1, 0]).bool(), torch.tensor([0, 0, 1, 1, 1])
    counts = statistics._class_counts(hits.double().numpy(), labels.numpy())
    draws = statistics._class_mean_draws(*counts, 200_000, np.random.default_rng(0))
    unbiased = (0.25 / 1 + (2 / 9) / 2) / 4  # of each class p (1 - p) / (n - 1); of two classes' mean a quarter
    assert draws.var() == pytest.approx(unbiased, rel=0.02)
    assert draws.mean() == pytest.approx((1 / 2 + 2 / 3) / 2, abs=0.003)


def test_chunks_change_nothing_but_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    hits, groups = captions(np.random.default_rng(7))
    whole = [mean_interval(hits, groups), median_interval(hits, groups), class_mean_interval(hits, groups)]
    monkeypatch.setattr(statistics, "_NUMBERS_AT_ONCE", 3000)
    parts = [mean_interval(hits, groups), median_interval(hits, groups), class_mean_interval(hits, groups)]
    assert np.allclose(whole, parts, atol=0.02)
    assert mean_interval(hits, groups, seed=1) == mean_interval(hits, groups, seed=1) != mean_interval(hits, groups)


def test_a_million_items_cost_nothing() -> None:
    hits = torch.arange(1_000_000) % 4 == 0
    found = mean_interval(hits)
    width = 2 * 1.96 * math.sqrt(0.25 * 0.75 / 1e6)
    assert found.high - found.low == pytest.approx(width, rel=0.1)
    assert mean_interval(hits, torch.arange(1_000_000) // 5).value == 0.25
    assert median_interval(torch.arange(1_000_000)).value == 499_999.5


def test_two_equal_models_differ_as_often_as_they_may() -> None:
    rng = np.random.default_rng(8)
    found: dict[str, list[float]] = {"paired": [], "class": [], "mcnemar": []}
    labels = torch.arange(200) % 20
    for run in range(RUNS):
        easy = rng.random(200)
        ours, theirs = (torch.from_numpy((easy + rng.random(200)) / 2 < 0.5) for _ in range(2))
        found["paired"].append(mean_difference(ours, theirs, resamples=1000, seed=run).p)
        found["class"].append(class_mean_difference(ours, theirs, labels, resamples=1000, seed=run).p)
        found["mcnemar"].append(mcnemar(ours, theirs))
    wrong = {name: np.mean(np.array(p) < 0.05) for name, p in found.items()}
    assert 0.02 <= wrong["paired"] <= 0.085
    assert 0.02 <= wrong["class"] <= 0.085
    assert 0.005 <= wrong["mcnemar"] <= 0.06  # an exact test keeps below


def test_a_difference_is_found() -> None:
    rng = np.random.default_rng(9)
    theirs = torch.from_numpy(rng.random(2000) < 0.5)
    ours = theirs | torch.from_numpy(rng.random(2000) < 0.05)
    found = mean_difference(ours, theirs)
    assert found.value == pytest.approx(float((ours.double() - theirs.double()).mean()))
    assert 0 < found.low < found.value < found.high
    assert found.p == pytest.approx(2 / 2001)
    assert mcnemar(ours, theirs) < 1e-6
    back = mean_difference(theirs, ours)
    assert (back.value, back.p) == (-found.value, found.p)
    assert mean_difference(ours, ours) == (0, 0, 0, 1)


@pytest.mark.parametrize(("only_ours", "only_theirs"), [(0, 0), (1, 0), (3, 9), (6, 6), (0, 12)])
def test_mcnemar_like_enumeration(only_ours: int, only_theirs: int) -> None:
    n = only_ours + only_theirs
    ours = torch.tensor([True] * only_ours + [False] * only_theirs + [True, False])
    theirs = torch.tensor([False] * only_ours + [True] * only_theirs + [True, False])
    splits = [bin(way).count("1") for way in range(2**n)]
    farther = sum(abs(split - n / 2) >= abs(only_ours - n / 2) for split in splits)
    assert mcnemar(ours, theirs) == pytest.approx(farther / 2**n)


def test_mcnemar_of_many() -> None:
    ours = torch.arange(200_000) < 100_800
    p = scipy.stats.binomtest(100_800, 200_000).pvalue
    assert mcnemar(ours, ~ours) == pytest.approx(p, rel=1e-6)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 30])
def test_student_like_scipy(freedom: int) -> None:
    for level in (0.5, 0.95, 0.99):
        assert student_quantile(level, freedom) == pytest.approx(scipy.stats.t.ppf((1 + level) / 2, freedom))


def test_over_seeds() -> None:
    found = over_seeds([1.0, 2.0, 6.0])
    assert (found.mean, found.deviation) == pytest.approx((3, math.sqrt(7)))
    low, high = scipy.stats.t.interval(0.95, 2, loc=3, scale=math.sqrt(7 / 3))
    assert (found.low, found.high) == pytest.approx((low, high))
    with pytest.raises(ValueError, match="one seed"):
        over_seeds([1.0])


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="one number an item"):
        mean_interval(torch.empty(0))
    with pytest.raises(ValueError, match="one group each"):
        mean_interval(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="same items"):
        mean_difference(torch.ones(3), torch.ones(2))
