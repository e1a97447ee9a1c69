"""Text-conditioned pooling beside plain loops."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from made import batch, features
from torch import Tensor
from torch.nn import functional as F

from declip.model.chunks import CHUNK_BYTES
from declip.model.heads import TextPooler
from declip.objectives.text_conditioned import TextConditioned, choose_texts, text_conditioned_sigmoid

SCALE, BIAS = torch.tensor(6.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def pooler() -> TextPooler:
    torch.manual_seed(0)
    pooler = TextPooler(5, 16).double()
    for parameter in pooler.parameters():  # biases too
        torch.nn.init.normal_(parameter, std=0.3)
    return pooler


def pooled(pooler: TextPooler, patches: Tensor, text: Tensor) -> Tensor:
    """One text and one image: attention written out, with an empty place to look at."""
    mapped = patches @ pooler.mapping.weight.T
    inputs = [
        F.layer_norm(x, (16,), norm.weight, norm.bias)
        for x, norm in zip((text, mapped, mapped), (pooler.ln_q, pooler.ln_k, pooler.ln_v), strict=True)
    ]
    weights, biases = pooler.attn.in_proj_weight.chunk(3), pooler.attn.in_proj_bias.chunk(3)
    query, keys, values = (x @ w.T + b for x, w, b in zip(inputs, weights, biases, strict=True))
    keys, values = (torch.cat([x, torch.zeros(1, 16, dtype=x.dtype)]) for x in (keys, values))
    heads = []
    for head in range(8):
        own = slice(2 * head, 2 * head + 2)
        shares = (keys[:, own] @ query[own] / math.sqrt(2)).softmax(dim=0)
        heads.append(shares @ values[:, own])
    found = torch.cat(heads) @ pooler.attn.out_proj.weight.T + pooler.attn.out_proj.bias
    return F.normalize(found, dim=-1)


@pytest.mark.parametrize("views", [1, 3])
def test_beside_loops(pooler: TextPooler, views: int) -> None:
    patches, texts = vectors(4, 3, 5), F.normalize(vectors(views, 4, 16, seed=1), dim=-1)
    choice = choose_texts(torch.arange(4), torch.arange(4), views)
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(4):
        met = [(texts[k, i], 1) for k in range(views)]
        met += [(texts[choice[i, j], j], -1) for j in range(4) if j != i]
        for text, sign in met:
            logit = SCALE * pooled(pooler, patches[i], text) @ text + BIAS
            expected = expected - F.logsigmoid(sign * logit)
    expected = expected / (4 + views - 1)
    parameters = list(pooler.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    for limit in (2**26, 1):  # all images at once, or one
        with mock.patch.dict(CHUNK_BYTES, cpu=limit):
            found = text_conditioned_sigmoid(pooler, patches, texts, choice, SCALE, BIAS)
            torch.testing.assert_close(found, expected)
            for gradient, own in zip(torch.autograd.grad(found, parameters), wanted, strict=True):
                torch.testing.assert_close(gradient, own)


def test_every_text_is_met_about_as_often() -> None:
    counts = torch.zeros(3)
    for step in range(20):
        ids = torch.randperm(1000, generator=torch.Generator().manual_seed(step))[:32]
        counts += torch.bincount(choose_texts(ids, ids, 3).flatten(), minlength=3)
    assert (counts / counts.sum() - 1 / 3).abs().max() < 0.03


def test_choices_change_with_the_batch_and_not_with_its_parts() -> None:
    ids = torch.tensor([3, 14, 15, 92, 65, 35])
    whole = choose_texts(ids, ids, 4)
    assert torch.equal(torch.cat([choose_texts(ids[:2], ids, 4), choose_texts(ids[2:], ids, 4)]), whole)
    other = torch.tensor([3, 14, 15, 92, 65, 89])
    assert not torch.equal(choose_texts(other, other, 4)[:, :5], whole[:, :5])


def test_the_term_says_what_it_lacks(pooler: TextPooler) -> None:
    with pytest.raises(ValueError, match="needs the image tower's tokens and a logit bias"):
        TextConditioned(pooler, ["caption"])(features(), batch())
