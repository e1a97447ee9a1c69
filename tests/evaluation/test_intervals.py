"""Intervals and differences stand under the names of the figures, around their values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from declip.evaluation import zero_shot
from declip.evaluation.intervals import (
    retrieval_differences,
    retrieval_intervals,
    zero_shot_differences,
    zero_shot_intervals,
)
from declip.evaluation.retrieval import metrics_of_ranks, retrieval_ranks
from declip.evaluation.zero_shot import zero_shot_ranks


def embeddings(noise: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(100, 32, generator=generator), dim=-1)
    owner = torch.arange(100).repeat_interleave(3)
    noises = torch.randn(300, 32, generator=generator)
    return images, F.normalize(images[owner] + noise * noises, dim=-1), owner


def test_retrieval() -> None:
    data, other = embeddings(0.4), embeddings(0.6)
    ranks, worse = retrieval_ranks(*data), retrieval_ranks(*other)
    metrics, owner = metrics_of_ranks(ranks), data[2]
    intervals = retrieval_intervals(ranks, owner)
    assert {name: found.value for name, found in intervals.items()} == pytest.approx(metrics)
    assert all(found.low <= found.value <= found.high for found in intervals.values())
    assert 1 < intervals["text_to_image_r1"].high - intervals["text_to_image_r1"].low < 30
    differences = retrieval_differences(ranks, worse, owner)
    assert differences.keys() == {name for name in metrics if "median" not in name}
    for name, found in differences.items():
        assert found.value == pytest.approx(metrics[name] - metrics_of_ranks(worse)[name])
    assert differences["text_to_image_r1"].low > 0
    assert differences["text_to_image_r1"].p < 0.01


def test_zero_shot() -> None:
    generator = torch.Generator().manual_seed(1)
    classes, labels = torch.eye(12), torch.randint(12, (300,), generator=generator)
    noise = torch.randn(300, 12, generator=generator)
    ranks, worse = (zero_shot_ranks(classes[labels] + scale * noise, classes, labels) for scale in (0.5, 1.0))
    metrics = zero_shot.metrics_of_ranks(ranks, labels, 12)
    intervals = zero_shot_intervals(ranks, labels, 12)
    assert {name: found.value for name, found in intervals.items()} == pytest.approx(metrics)
    assert all(1 < found.high - found.low < 20 for found in intervals.values())
    differences = zero_shot_differences(ranks, worse, labels, 12)
    for name, found in differences.items():
        assert found.value == pytest.approx(metrics[name] - zero_shot.metrics_of_ranks(worse, labels, 12)[name])
        assert 0 < found.low < found.high
        assert found.p < 0.01
