"""Figures of embeddings against naive loops in float64, and of embeddings whose figures are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.evaluation import health
from declip.evaluation.health import effective_rank, embedding_health, uniformity


def example() -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of any length; some images have several texts, some none."""
    generator = torch.Generator().manual_seed(0)
    images, owner = torch.randn(20, 6, generator=generator) + 0.5, torch.tensor([*range(18), 3, 3, 7])
    return images, images[owner] + torch.randn(21, 6, generator=generator) - 0.3, owner


def naive(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float]:
    image, text = ([row / np.linalg.norm(row) for row in side.double().numpy()] for side in (images, texts))
    pairs = [(i, t) for i in range(len(image)) for t in range(len(text))]
    matched = [image[i] @ text[t] for i, t in pairs if owner[t] == i]
    found = {
        "alignment": np.mean([((image[int(i)] - text[t]) ** 2).sum() for t, i in enumerate(owner)]),
        "modality_gap": np.linalg.norm(np.mean(image, 0) - np.mean(text, 0)),
        "matched_cosine": np.mean(matched),
        "unmatched_cosine": np.mean([image[i] @ text[t] for i, t in pairs if owner[t] != i]),
    }
    for name, side in (("image", image), ("text", text)):
        n = len(side)
        close = [math.exp(-2 * ((side[i] - side[j]) ** 2).sum()) for i in range(n) for j in range(n) if i != j]
        singular = np.linalg.svd(np.stack(side), compute_uv=False)
        share = singular / singular.sum()
        found[f"{name}_uniformity"] = math.log(sum(close) / len(close))
        found[f"{name}_effective_rank"] = math.exp(-(share * np.log(share)).sum())
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("at_once", [None, 3])
def test_like_naive(at_once: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if at_once:
        monkeypatch.setattr(health, "_ROWS_AT_ONCE", at_once)
        monkeypatch.setattr(health, "_DISTANCES_AT_ONCE", 20 * at_once)
    expected = naive(*example())
    assert embedding_health(*example()) == pytest.approx(expected, rel=1e-9)


def test_known_figures() -> None:
    one_point = torch.tensor([[3.0, 4.0]]).repeat(5, 1)
    assert uniformity(one_point) == pytest.approx(0)
    assert effective_rank(one_point) == pytest.approx(1)
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    opposite = embedding_health(one_point, -one_point, torch.arange(5))
    assert (opposite["modality_gap"], opposite["alignment"], opposite["unmatched_cosine"]) == pytest.approx((2, 4, -1))
    single = embedding_health(torch.eye(1), torch.eye(1), torch.tensor([0]))
    assert math.isnan(single["unmatched_cosine"])
    assert math.isnan(single["image_uniformity"])


def test_a_sample_stands_for_all() -> None:
    embeddings = torch.randn(5000, 16, generator=torch.Generator().manual_seed(0))
    whole = uniformity(embeddings)
    assert uniformity(embeddings, sample=1000) == pytest.approx(whole, abs=0.02)
    assert uniformity(embeddings, sample=1000) == uniformity(embeddings, sample=1000)
    assert uniformity(embeddings, sample=1000) != uniformity(embeddings, sample=1000, seed=1)
    # The logarithm of the mean over the sphere of exp(4 cos - 4), from an independent sample of pairs.
    generator = torch.Generator().manual_seed(1)
    first, second = (normalize(torch.randn(400_000, 16, generator=generator), dim=-1) for _ in range(2))
    assert whole == pytest.approx(float((4 * (first * second).sum(1) - 4).exp().mean().log()), abs=0.02)


def test_half_precision_is_looked_at_in_float64() -> None:
    images, texts, owner = example()
    found = embedding_health(images.half(), texts.half(), owner)
    assert found == pytest.approx(embedding_health(images.half().double(), texts.half().double(), owner))


def test_wrong_input() -> None:
    images, texts, owner = example()
    with pytest.raises(ValueError, match="tokens"):
        embedding_health(images[None], texts[None], owner)
    with pytest.raises(ValueError, match="one image row"):
        embedding_health(images, texts, owner[1:])
    with pytest.raises(ValueError, match="outside"):
        embedding_health(images[:5], texts, owner)
