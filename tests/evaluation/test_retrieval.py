"""Recall against a naive loop: several captions an image, ties, chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from declip.evaluation.retrieval import RECALL_AT, retrieval_metrics


def naive(images: Tensor, texts: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """The definition, one query at a time: the right item stands behind every wrong one that scores as high."""
    scores = (images @ texts.T).tolist()
    owner = image_of_text.tolist()
    text_ranks, image_ranks = [], []
    for text, right in enumerate(owner):
        wrong = [scores[image][text] for image in range(len(images)) if image != right]
        text_ranks.append(sum(score >= scores[right][text] for score in wrong))
    for image in sorted(set(owner)):
        best = max(scores[image][text] for text in range(len(texts)) if owner[text] == image)
        wrong = [scores[image][text] for text in range(len(texts)) if owner[text] != image]
        image_ranks.append(sum(score >= best for score in wrong))
    metrics = {}
    for way, ranks in (("text_to_image", text_ranks), ("image_to_text", image_ranks)):
        for k in RECALL_AT:
            metrics[f"{way}_r{k}"] = 100 * sum(rank < k for rank in ranks) / len(ranks)
    return metrics


def example(images: int, texts: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Texts that lie near their image, in a shuffled order, a different number for each image."""
    generator = torch.Generator().manual_seed(seed)
    image_embeddings = F.normalize(torch.randn(images, 8, generator=generator), dim=-1)
    owner = torch.cat([torch.arange(images), torch.randint(images, (texts - images,), generator=generator)])
    owner = owner[torch.randperm(texts, generator=generator)]
    noise = torch.randn(texts, 8, generator=generator)
    return image_embeddings, F.normalize(image_embeddings[owner] + 0.4 * noise, dim=-1), owner


@pytest.mark.parametrize(("images", "texts"), [(1, 1), (3, 3), (40, 40), (40, 200), (60, 61)])
def test_like_naive(images: int, texts: int) -> None:
    data = example(images, texts)
    assert retrieval_metrics(*data) == pytest.approx(naive(*data))


@pytest.mark.parametrize("chunk", [1, 7, 39, 40, 1000])
def test_chunks_change_nothing(chunk: int) -> None:
    data = example(40, 150)
    expected = naive(*data)
    assert 10 < expected["text_to_image_r1"] < 90  # the example has right and wrong answers
    assert retrieval_metrics(*data, chunk=chunk) == pytest.approx(expected)


def test_perfect() -> None:
    eye = torch.eye(12)
    metrics = retrieval_metrics(eye, eye, torch.arange(12))
    assert set(metrics) == {f"{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    assert set(metrics.values()) == {100.0}


def test_any_of_an_images_captions_is_a_hit() -> None:
    images = torch.eye(2)
    texts = torch.stack([images[0], images[1], images[1]])  # text 1 belongs to image 0 and lies at image 1
    metrics = retrieval_metrics(images, texts, torch.tensor([0, 0, 1]))
    assert metrics["image_to_text_r1"] == 50.0  # image 0 by its text 0; image 1 ties with the stray text
    assert metrics["text_to_image_r1"] == pytest.approx(200 / 3)


def test_ties_count_against_the_model() -> None:
    same = F.normalize(torch.ones(20, 4), dim=-1)
    metrics = retrieval_metrics(same, same, torch.arange(20))
    assert set(metrics.values()) == {0.0}
    six = retrieval_metrics(same[:6], same[:6], torch.arange(6))
    assert six["text_to_image_r5"] == six["image_to_text_r5"] == 0.0
    assert six["text_to_image_r10"] == six["image_to_text_r10"] == 100.0


def test_rounding_does_not_break_a_tie() -> None:
    images, texts, owner = example(30, 30)
    texts = torch.cat([texts, F.normalize(texts + 1e-8, dim=-1)])  # every text again, with another image
    metrics = retrieval_metrics(images, texts, torch.cat([owner, owner.roll(1)]))
    assert metrics["image_to_text_r1"] == 0.0


def test_identical_captions_of_two_images_are_ties() -> None:
    images = torch.eye(3)
    texts = images[[0, 0, 2]]  # the first two images have the same caption
    metrics = retrieval_metrics(images, texts, torch.arange(3))
    assert metrics["image_to_text_r1"] == pytest.approx(100 / 3)
    assert metrics["text_to_image_r1"] == pytest.approx(200 / 3)


def test_nan_is_never_a_hit() -> None:
    broken = torch.full((20, 4), torch.nan)
    metrics = retrieval_metrics(broken, broken, torch.arange(20))
    assert set(metrics.values()) == {0.0}


def test_image_without_caption_is_no_query_but_a_wrong_answer() -> None:
    images = torch.eye(2)[[0, 1, 0]]  # the third image looks like the first and has no caption
    metrics = retrieval_metrics(images, torch.eye(2), torch.arange(2))
    assert metrics["image_to_text_r1"] == 100.0
    assert metrics["text_to_image_r1"] == 50.0


@pytest.mark.parametrize("owner", [[0], [0, 1, 2], [0, 2], [-1, 0]])
def test_wrong_owner(owner: list[int]) -> None:
    with pytest.raises(ValueError, match="image"):
        retrieval_metrics(torch.eye(2), torch.eye(2), torch.tensor(owner))
