"""Recall against a naive loop: several captions an image, ties, chunks."""

from __future__ import annotations

import statistics

import pytest
import torch
from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
from torch import Tensor
from torch.nn import functional as F

from declip.evaluation import retrieval
from declip.evaluation.retrieval import RECALL_AT, retrieval_metrics, retrieval_ranks
from declip.model.token_similarity import similarity, similarity_of_pairs

Scores = list[list[float]]
WAYS = ("text_to_image", "image_to_text")


def naive(images: Tensor, texts: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """The definition, one query at a time: the right item stands behind every wrong one that scores as high."""
    return metrics(*naive_ranks((images @ texts.T).tolist(), (texts @ images.T).T.tolist(), image_of_text))


def naive_ranks(scores: Scores, from_texts: Scores, image_of_text: Tensor) -> tuple[list[int], list[int]]:
    """Of texts and of images with a text; both scores are [images][texts], each of one direction."""
    owner = image_of_text.tolist()
    text_ranks, image_ranks = [], []
    for text, right in enumerate(owner):
        wrong = [from_texts[image][text] for image in range(len(scores)) if image != right]
        text_ranks.append(sum(score >= from_texts[right][text] for score in wrong))
    for image in sorted(set(owner)):
        best = max(scores[image][text] for text in range(len(owner)) if owner[text] == image)
        wrong = [scores[image][text] for text in range(len(owner)) if owner[text] != image]
        image_ranks.append(sum(score >= best for score in wrong))
    return text_ranks, image_ranks


def metrics(text_ranks: list[int], image_ranks: list[int]) -> dict[str, float]:
    found = {}
    for way, ranks in (("text_to_image", text_ranks), ("image_to_text", image_ranks)):
        for k in RECALL_AT:
            found[f"{way}_r{k}"] = 100 * sum(rank < k for rank in ranks) / len(ranks)
        found[f"{way}_median_rank"] = statistics.median(ranks) + 1
    return found


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
    recalls = {f"{way}_r{k}": 100.0 for way in WAYS for k in (1, 5, 10)}
    ranks = {f"{way}_median_rank": 1.0 for way in WAYS}
    assert retrieval_metrics(eye, eye, torch.arange(12)) == {**recalls, **ranks}


def test_any_of_an_images_captions_is_a_hit() -> None:
    images = torch.eye(2)
    texts = torch.stack([images[0], images[1], images[1]])  # text 1 belongs to image 0 and lies at image 1
    metrics = retrieval_metrics(images, texts, torch.tensor([0, 0, 1]))
    assert metrics["image_to_text_r1"] == 50.0  # image 0 by its text 0; image 1 ties with the stray text
    assert metrics["text_to_image_r1"] == pytest.approx(200 / 3)


def test_ties_count_against_the_model() -> None:
    same = F.normalize(torch.ones(20, 4), dim=-1)
    ranks = retrieval_ranks(same, same, torch.arange(20))
    assert [ranks[way].tolist() for way in WAYS] == [[19] * 20] * 2
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
    ranks = retrieval_ranks(broken, broken, torch.arange(20))
    assert [ranks[way].tolist() for way in WAYS] == [[19] * 20] * 2


def test_nan_stands_above_the_right_one() -> None:
    images, texts, owner = example(40, 80)
    images[3], texts[5] = torch.nan, torch.nan
    ranks = retrieval_ranks(images, texts, owner, chunk=7)
    for text in set(range(80)) - {5} - set((owner == 3).nonzero()[:, 0].tolist()):
        others = [image for image in range(40) if image not in (3, owner[text])]
        wrong = sum(bool(images[image] @ texts[text] >= images[owner[text]] @ texts[text]) for image in others)
        assert ranks["text_to_image"][text] == wrong + 1  # the image that is not a number
    assert ranks["text_to_image"][5] == 39
    assert ranks["text_to_image"][owner == 3].tolist() == [39] * int((owner == 3).sum())
    assert ranks["image_to_text"][3] == 80 - (owner == 3).sum()
    assert ranks["image_to_text"][owner[5]] == 80 - (owner == owner[5]).sum()


def test_image_without_caption_is_no_query_but_a_wrong_answer() -> None:
    images = torch.eye(2)[[0, 1, 0]]  # the third image looks like the first and has no caption
    metrics = retrieval_metrics(images, torch.eye(2), torch.arange(2))
    assert metrics["image_to_text_r1"] == 100.0
    assert metrics["text_to_image_r1"] == 50.0


@pytest.mark.parametrize("owner", [[0], [0, 1, 2], [0, 2], [-1, 0]])
def test_wrong_owner(owner: list[int]) -> None:
    with pytest.raises(ValueError, match="image"):
        retrieval_metrics(torch.eye(2), torch.eye(2), torch.tensor(owner))


@pytest.mark.parametrize("chunk", [None, 3])
def test_blocks_on_both_axes_change_nothing(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    data = example(40, 150)
    whole = retrieval_ranks(*data)
    monkeypatch.setattr(retrieval, "_BLOCK", {"cpu": (16, 8)})
    monkeypatch.setattr(retrieval, "_SCORES_AT_ONCE", 100)
    shapes = []

    def noted(queries: Tensor, items: Tensor) -> Tensor:
        shapes.append((len(queries), len(items)))
        return similarity(queries, items)

    monkeypatch.setattr(retrieval, "similarity", noted)
    blocks = retrieval_ranks(*data, chunk=chunk)
    assert [blocks[way].tolist() for way in WAYS] == [whole[way].tolist() for way in WAYS]
    assert whole["text_to_image"].max() > 0
    assert max(shapes) == (chunk or 16, 8)
    assert sum(height * width for height, width in shapes) == 40 * 150  # each score once, for both directions


@pytest.mark.parametrize("tokens", [False, True])
def test_some_queries_are_ranked_among_all(tokens: bool) -> None:
    images, texts, owner = example(40, 150)
    if tokens:
        images, texts = images.view(40, 2, 4), texts.view(150, 2, 4)
    whole, queries = retrieval_ranks(images, texts, owner), torch.tensor([30, 4, 4, 17])
    some = retrieval_ranks(images, texts, owner, queries=queries)
    assert some["text_to_image"].tolist() == whole["text_to_image"][torch.isin(owner, queries)].tolist()
    assert some["image_to_text"].tolist() == whole["image_to_text"][[4, 17, 30]].tolist()
    with pytest.raises(ValueError, match="none of the images"):
        retrieval_ranks(images, texts, owner.clamp(max=9), queries=torch.tensor([12]))


def test_token_wise_like_naive() -> None:
    generator = torch.Generator().manual_seed(0)
    owner = torch.tensor([5, 0, 2, 2, 1, 5, 0, 3, 1, 2])
    images = F.normalize(torch.randn(6, 4, 8, generator=generator), dim=-1)
    texts = F.normalize(images[owner][:, :3] + 0.6 * torch.randn(10, 3, 8, generator=generator), dim=-1)
    texts[::2, 2] = 0  # padding
    ranks = naive_ranks(similarity(images, texts).tolist(), similarity(texts, images).T.tolist(), owner)
    assert sum(map(sum, ranks)) > 0
    assert retrieval_metrics(images, texts, owner) == pytest.approx(metrics(*ranks))
    assert retrieval_metrics(images, texts, owner, chunk=1) == pytest.approx(metrics(*ranks))


@pytest.mark.parametrize("tokens", [None, 5])
def test_similarity_of_pairs_is_the_diagonal(tokens: int | None) -> None:
    shape = (7, 8) if tokens is None else (7, tokens, 8)
    queries, items = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    if tokens is not None:
        queries[2, 3:], items[4, 1:] = 0, 0
    assert torch.allclose(similarity_of_pairs(queries, items), similarity(queries, items).diagonal(), atol=1e-6)


def test_half_precision_is_ranked_in_float32() -> None:
    images, texts, owner = example(40, 150)
    images, texts = images.half(), texts.half()
    halves, floats = retrieval_ranks(images, texts, owner), retrieval_ranks(images.float(), texts.float(), owner)
    assert [halves[way].tolist() for way in WAYS] == [floats[way].tolist() for way in WAYS]


@pytest.mark.parametrize("clusters", [None, 20])
@pytest.mark.parametrize("captions", [1, 5])
def test_recalls_are_those_of_clip_benchmark(clusters: int | None, captions: int) -> None:
    images, texts, owner = pairs(200, captions, clusters)
    scores = texts @ images.T
    right = torch.zeros_like(scores, dtype=torch.bool)
    right[torch.arange(len(texts)), owner] = True
    ours = retrieval_metrics(images, texts, owner)
    for k in RECALL_AT:
        for way, s, r in (("text_to_image", scores, right), ("image_to_text", scores.T, right.T)):
            found = batchify(recall_at_k, s, r, 64, "cpu", k=k) > 0
            assert ours[f"{way}_r{k}"] == 100 * int(found.sum()) / len(found)
            assert 0 < ours[f"{way}_r{k}"] < 100


def pairs(images: int, captions: int, clusters: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Images at random or around a few centres, each with texts near it."""
    generator = torch.Generator().manual_seed(3)
    places = torch.randn(images, 64, generator=generator)
    if clusters is not None:
        places = places * 0.5 + torch.randn(clusters, 64, generator=generator).repeat(images // clusters, 1)
    owner = torch.arange(images).repeat_interleave(captions)
    noise = torch.randn(len(owner), 64, generator=generator)
    return F.normalize(places, dim=-1), F.normalize(places[owner] + 4 * noise, dim=-1), owner
