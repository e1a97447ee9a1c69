"""Zero-shot metrics against a naive count."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from declip.evaluation.zero_shot import zero_shot_metrics


def test_metrics_like_naive() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = F.normalize(torch.randn(12, 8, generator=generator), dim=-1)
    labels = torch.randint(12, (200,), generator=generator)
    images = F.normalize(classes[labels] + 0.5 * torch.randn(200, 8, generator=generator), dim=-1)
    best = (images @ classes.T).topk(5).indices
    metrics = zero_shot_metrics(images, classes, labels)
    assert metrics["top1"] == pytest.approx(100 * (best[:, 0] == labels).double().mean().item())
    assert metrics["top5"] == pytest.approx(100 * (best == labels[:, None]).any(1).double().mean().item())
    assert 10 < metrics["top1"] < metrics["top5"] < 100


def test_few_classes_and_ties() -> None:
    images = torch.eye(2)
    assert zero_shot_metrics(images, images, torch.tensor([0, 0])) == {"top1": 50.0, "top5": 100.0}
    same = torch.ones(8, 1)
    assert zero_shot_metrics(same, same, torch.arange(8)) == {"top1": 0.0, "top5": 0.0}
    assert zero_shot_metrics(same * torch.nan, same, torch.arange(8)) == {"top1": 0.0, "top5": 0.0}


@pytest.mark.parametrize("labels", [[0], [0, 2], [-1, 0]])
def test_wrong_labels(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="label"):
        zero_shot_metrics(torch.eye(2), torch.eye(2), torch.tensor(labels))
