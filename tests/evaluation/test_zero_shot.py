"""Zero-shot metrics against a naive count."""

from __future__ import annotations

import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor
from torch.nn import functional as F

from declip.evaluation.zero_shot import zero_shot_metrics, zero_shot_ranks


def example() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    classes = F.normalize(torch.randn(12, 8, generator=generator), dim=-1)
    labels = torch.randint(12, (200,), generator=generator).clamp(max=9)  # uneven, and two classes have no image
    return F.normalize(classes[labels] + 0.5 * torch.randn(200, 8, generator=generator), dim=-1), classes, labels


def test_metrics_like_naive() -> None:
    images, classes, labels = example()
    best = (images @ classes.T).topk(5).indices
    metrics = zero_shot_metrics(images, classes, labels)
    assert metrics["top1"] == pytest.approx(100 * (best[:, 0] == labels).double().mean().item())
    assert metrics["top5"] == pytest.approx(100 * (best == labels[:, None]).any(1).double().mean().item())
    assert 10 < metrics["top1"] < metrics["top5"] < 100


def test_few_classes_and_ties() -> None:
    images = torch.eye(2)
    assert zero_shot_metrics(images, images, torch.tensor([0, 0])) == {
        "top1": 50.0,
        "top5": 100.0,
        "mean_per_class": 50.0,
    }
    same = torch.ones(8, 1)
    none = {"top1": 0.0, "top5": 0.0, "mean_per_class": 0.0}
    assert zero_shot_metrics(same, same, torch.arange(8)) == none
    assert zero_shot_metrics(same * torch.nan, same, torch.arange(8)) == none


@pytest.mark.parametrize("labels", [[0], [0, 2], [-1, 0]])
def test_wrong_labels(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="label"):
        zero_shot_metrics(torch.eye(2), torch.eye(2), torch.tensor(labels))


def test_like_clip_benchmark_and_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    # It calls float() of an array of one number, which numpy refuses by now.
    monkeypatch.setattr(zeroshot_classification, "float", lambda array: array.item(), raising=False)
    images, classes, labels = example()
    scores = images @ classes.T
    metrics = zero_shot_metrics(images, classes, labels)
    top1, top5 = zeroshot_classification.accuracy(scores, labels, topk=(1, 5))
    assert (metrics["top1"], metrics["top5"]) == pytest.approx((100 * top1, 100 * top5), rel=1e-12)
    balanced = 100 * balanced_accuracy_score(labels, scores.argmax(1))
    assert metrics["mean_per_class"] == pytest.approx(balanced)
    assert abs(metrics["mean_per_class"] - metrics["top1"]) > 0.1


def test_a_subset_of_the_classes() -> None:
    images, classes, labels = example()
    subset = torch.tensor([9, 2, 5])
    chosen = torch.isin(labels, subset)
    given = images[chosen], classes, labels[chosen]
    expected = subset[(images[chosen] @ classes[subset].T).argmax(1)] == labels[chosen]
    assert ((zero_shot_ranks(*given, subset) == 0) == expected).all()
    metrics = zero_shot_metrics(*given, subset)
    assert metrics["top1"] == pytest.approx(100 * expected.double().mean().item())
    assert metrics["top5"] == 100 > metrics["top1"] > zero_shot_metrics(*given)["top1"]
    with pytest.raises(ValueError, match="outside the subset"):
        zero_shot_ranks(images, classes, labels, subset)
    for wrong in ([2, 2], [2, 12], [-1, 2]):
        with pytest.raises(ValueError, match="each once"):
            zero_shot_ranks(*given, torch.tensor(wrong))
