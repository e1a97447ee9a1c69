"""Reranking: beside a plain loop over all pairs, and by a model that was trained for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import pair, write_pairs
from torch import Tensor
from torch.nn import functional as F

from declip.cli import main
from declip.evaluation.rerank import rerank
from declip.evaluation.retrieval import retrieval_ranks
from declip.model.heads import TextPooler
from declip.model.pretrained import load
from declip.recipe import Recipe
from declip.training.loop import train


def made(images: int, captions: int) -> tuple[Tensor, Tensor, Tensor, Tensor, TextPooler]:
    """Embeddings, what belongs together, patches, and a pooler with random weights."""
    torch.manual_seed(images)
    owner = torch.arange(images).repeat_interleave(captions)
    embedded = F.normalize(torch.randn(images, 16), dim=-1), F.normalize(torch.randn(len(owner), 16), dim=-1)
    pooler = TextPooler(6, 16)
    for parameter in pooler.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return *embedded, owner, torch.randn(images, 4, 6), pooler


@pytest.mark.parametrize("top", [1, 4, 9, 100])
@pytest.mark.parametrize("captions", [1, 3])
def test_beside_a_plain_loop(top: int, captions: int) -> None:
    images, texts, owner, patches, pooler = made(9, captions)
    ranks = retrieval_ranks(images, texts, owner)
    found = rerank(ranks, images, texts, owner, enumerate(patches), pooler, top)
    with torch.no_grad():
        scores = torch.stack([(pooler(own[None], texts[None])[0] * texts).sum(-1) for own in patches], dim=1)
    plain = texts @ images.T
    for text in range(len(texts)):
        hits = plain[text].topk(min(top, len(images))).indices.tolist()
        expected = int(ranks["text_to_image"][text])
        if owner[text] in hits:
            expected = sum(bool(scores[text, i] >= scores[text, owner[text]]) for i in hits if i != owner[text])
        assert int(found["text_to_image"][text]) == expected
    for image in range(len(images)):
        hits = plain[:, image].topk(min(top, len(texts))).indices.tolist()
        own = [scores[t, image] for t in hits if owner[t] == image]
        expected = int(ranks["image_to_text"][image])
        if own:
            expected = sum(bool(scores[t, image] >= max(own)) for t in hits if owner[t] != image)
        assert int(found["image_to_text"][image]) == expected
    if top == 1:  # one hit has one order
        assert all(torch.equal(found[way], own) for way, own in ranks.items())


def test_a_trained_model_reranks(
    tiny: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny("clip", "terms.text_conditioned.texts=['caption']", "model.logit_bias_init=-3")
    train(recipe, tmp_path / "run", quiet=True)
    model = load(tmp_path / "run")
    assert model.text_pooler is not None
    rows = [pair(n) for n in range(100, 112)]
    rows[3]["image"] = b"broken"
    test = write_pairs(tmp_path / "test.parquet", rows)
    figures = []
    for more in ([], ["--rerank", "1"], ["--rerank", "5"]):
        assert main(["evaluate", str(tmp_path / "run"), str(test), "--task", "retrieval", "--json", *more]) == 0
        figures.append(json.loads(capsys.readouterr().out)["results"][0])
    assert figures[0]["metrics"] == figures[1]["metrics"]
    assert "reranked" not in figures[0]
    assert figures[2]["reranked"] == 5
    # Nothing beyond the first five moves, either way.
    for way in ("text_to_image", "image_to_text"):
        assert figures[2]["metrics"][f"{way}_r5"] == pytest.approx(figures[0]["metrics"][f"{way}_r5"])
        assert figures[2]["undecodable"] == 1


def test_other_models_say_that_they_cannot(
    tiny: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny("clip"), tmp_path / "run", quiet=True)
    test = write_pairs(tmp_path / "test.parquet", [pair(n) for n in range(100, 112)])
    assert main(["evaluate", str(tmp_path / "run"), str(test), "--task", "retrieval", "--rerank", "5"]) == 2
    assert "was not trained with terms.text_conditioned" in capsys.readouterr().err
