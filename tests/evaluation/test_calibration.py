"""Calibration error against naive loops; a temperature that is known is found."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from declip.evaluation import calibration
from declip.evaluation.calibration import calibrate, calibration_error, fit_temperature, reliability


def example(items: int = 4000, classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn with just the probabilities that these give."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(items, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def confidences(items: int = 1000) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    confidence = torch.rand(items, generator=generator).double()
    return confidence, torch.rand(items, generator=generator) < confidence**2


def test_error_like_naive() -> None:
    confidence, correct = confidences()
    expected = 0.0
    for number in range(15):
        inside = [i for i, c in enumerate(confidence.tolist()) if number / 15 < c <= (number + 1) / 15]
        accuracy = sum(correct[i].item() for i in inside) / len(inside)
        expected += len(inside) / 1000 * abs(accuracy - sum(confidence[i].item() for i in inside) / len(inside))
    assert calibration_error(confidence, correct) == pytest.approx(expected)
    assert expected > 0.1


def test_adaptive_error_like_naive() -> None:
    confidence, correct = confidences()
    confidence = confidence**3
    order = sorted(range(1000), key=lambda i: confidence[i].item())
    bounds = [math.ceil(number * 1000 / 15) for number in range(16)]
    expected = 0.0
    for start, end in itertools.pairwise(bounds):
        inside = order[start:end]
        accuracy = sum(correct[i].item() for i in inside) / len(inside)
        expected += len(inside) / 1000 * abs(accuracy - sum(confidence[i].item() for i in inside) / len(inside))
    assert calibration_error(confidence, correct, adaptive=True) == pytest.approx(expected)
    assert {found.items for found in reliability(confidence, correct, adaptive=True)} == {66, 67}


def test_bins() -> None:
    found = reliability(torch.tensor([0.0, 0.25, 0.26, 1.0]), torch.tensor([False, True, True, True]), bins=4)
    assert [bin.items for bin in found] == [2, 1, 1]
    assert found[0] == (2, 0.125, 0.5)
    assert found[2] == (1, 1.0, 1.0)
    assert len(reliability(torch.tensor([0.5, 0.6]), torch.tensor([True, False]), adaptive=True)) == 2


@pytest.mark.parametrize("scale", [0.02, 1.0, 7.0, 300.0])
def test_a_known_temperature_is_found(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = example()
    found = fit_temperature(scale * logits, labels)
    assert found / scale == pytest.approx(1, abs=0.05)
    values = [F.cross_entropy(scale * logits / (found * by), labels).item() for by in (0.99, 1.0, 1.01)]
    assert values[1] == min(values)
    monkeypatch.setattr("declip.evaluation.retrieval._SCORES_AT_ONCE", 5000)
    assert fit_temperature(scale * logits, labels) == pytest.approx(found)


def test_ends_of_the_temperature() -> None:
    logits = torch.eye(4)
    assert fit_temperature(logits, torch.arange(4)) < 0.1  # every answer is right: no confidence is too high
    assert fit_temperature(logits, torch.arange(4).roll(1)) > 1000
    assert fit_temperature(torch.zeros(4, 4), torch.arange(4)) > 0


def test_error_before_and_after() -> None:
    logits, labels = example()
    found = calibrate(5 * logits, labels)
    assert found.temperature == pytest.approx(5, rel=0.1)
    assert found.error > 0.15
    assert found.adaptive_error == pytest.approx(found.error, abs=0.02)
    assert max(found.error_after, found.adaptive_error_after) < 0.03
    assert found.likelihood == pytest.approx(F.cross_entropy(5 * logits, labels).item(), rel=1e-5)
    assert found.likelihood_after == pytest.approx(F.cross_entropy(logits, labels).item(), rel=0.01)
    good = calibrate(logits, labels)
    assert good.temperature == pytest.approx(1, abs=0.05)
    assert good.error < 0.02


def test_each_half_is_judged_by_the_others_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that say nothing, of few items and many classes: what is fitted on them themselves flatters."""
    fitted: list[Tensor] = []

    def fit(logits: Tensor, labels: Tensor) -> float:
        fitted.append(labels)
        return [2.0, 8.0][len(fitted) - 1]

    monkeypatch.setattr(calibration, "fit_temperature", fit)
    logits, labels = example(60, 60)
    labels = torch.arange(60)  # so that a label names its item
    found = calibrate(logits, labels)
    halves = [half.tolist() for half in fitted]
    assert sorted(halves[0] + halves[1]) == list(range(60))
    assert len(halves[0]) == 30
    losses = [F.cross_entropy(logits[half] / t, labels[half]) for half, t in zip(halves, (8.0, 2.0), strict=True)]
    assert found.likelihood_after == pytest.approx(sum(losses).item() / 2)
    assert found.temperature == 4.0


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="one label a row"):
        calibrate(torch.ones(2, 3), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="outside"):
        calibrate(torch.ones(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="finite"):
        calibrate(torch.full((2, 3), torch.nan), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="two items"):
        calibrate(torch.ones(1, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibration_error(torch.tensor([1.5]), torch.tensor([True]))
    with pytest.raises(ValueError, match="one confidence"):
        calibration_error(torch.tensor([0.5]), torch.tensor([True, True]))
