"""Masked language modelling against plain loops, over the whole vocabulary and over the tokens in use."""

from __future__ import annotations

import math

import pytest
import torch
from made import batch, features
from torch import Tensor
from torch.nn import functional as F

from declip.model.chunks import CHUNK_BYTES
from declip.objectives.masked_language import MaskedLanguage

WIDTH, VOCABULARY = 6, 30
USED = torch.tensor([2, 3, 5, 7, 11, 13])


@pytest.fixture
def tokens() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 7, WIDTH, requires_grad=True)


@pytest.fixture
def labels() -> Tensor:
    labels = torch.full((5, 7), -100)
    labels[0, 2], labels[0, 4], labels[3, 1], labels[4, 6] = 7, 2, 13, 7
    return labels


@torch.no_grad()
def naive(term: MaskedLanguage, tokens: Tensor, labels: Tensor, vocabulary: list[int]) -> float:
    """Mean over the hidden tokens of -log softmax over the vocabulary."""
    losses = []
    for row in range(5):
        for position in range(7):
            label = int(labels[row, position])
            if label == -100:
                continue
            logits = {
                token: float(term.head.weight[line] @ tokens[row, position] + term.head.bias[line])
                for line, token in enumerate(vocabulary)
            }
            losses.append(math.log(sum(math.exp(logit) for logit in logits.values())) - logits[label])
    return sum(losses) / len(losses)


def test_like_naive(tokens: Tensor, labels: Tensor) -> None:
    term = MaskedLanguage(WIDTH, VOCABULARY)
    loss = term(features(text_tokens={"masked": tokens}), batch(labels=labels))
    assert loss.item() == pytest.approx(naive(term, tokens, labels, list(range(VOCABULARY))), rel=1e-5)


def test_a_few_rows_at_a_time(tokens: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients of the logits kept whole."""
    term = MaskedLanguage(WIDTH, VOCABULARY)
    hidden = labels != -100
    given = [tokens, term.head.weight, term.head.bias]
    whole = F.cross_entropy(term.head(tokens[hidden]), labels[hidden])
    expected = [whole.detach(), *torch.autograd.grad(whole, given)]
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 3 * 4 * VOCABULARY)
    loss = term.loss(tokens, labels)
    torch.testing.assert_close([loss.detach(), *torch.autograd.grad(loss, given)], expected)


def test_used_vocabulary_like_naive(tokens: Tensor, labels: Tensor) -> None:
    term = MaskedLanguage(WIDTH, VOCABULARY, USED)
    assert term.head.weight.shape == (len(USED), WIDTH)
    loss = term(features(text_tokens={"masked": tokens}), batch(labels=labels))
    assert loss.item() == pytest.approx(naive(term, tokens, labels, USED.tolist()), rel=1e-5)


def test_used_vocabulary_is_the_whole_one_restricted(tokens: Tensor, labels: Tensor) -> None:
    """The same rows of the head, the others' logits at minus infinity: the same loss and the same gradients."""
    whole, used = MaskedLanguage(WIDTH, VOCABULARY), MaskedLanguage(WIDTH, VOCABULARY, USED)
    used.head.weight.data, used.head.bias.data = whole.head.weight.data[USED], whole.head.bias.data[USED]
    used(features(text_tokens={"masked": tokens}), batch(labels=labels)).backward()
    assert tokens.grad is not None
    gradient, tokens.grad = tokens.grad, None

    unused = torch.ones(VOCABULARY, dtype=torch.bool)
    unused[USED] = False
    logits = whole.head(tokens).masked_fill(unused, float("-inf"))
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    torch.testing.assert_close(gradient, tokens.grad)
    torch.testing.assert_close(used.head.weight.grad, whole.head.weight.grad[USED])


def test_gradient_to_hidden_positions_alone(tokens: Tensor, labels: Tensor) -> None:
    MaskedLanguage(WIDTH, VOCABULARY)(features(text_tokens={"masked": tokens}), batch(labels=labels)).backward()
    assert tokens.grad is not None
    assert ((tokens.grad.abs().sum(-1) > 0) == (labels != -100)).all()


@pytest.mark.parametrize("used", [None, USED])
def test_nothing_hidden_costs_nothing(tokens: Tensor, used: Tensor | None) -> None:
    term = MaskedLanguage(WIDTH, VOCABULARY, used)
    loss = term(features(text_tokens={"masked": tokens}), batch(labels=torch.full((5, 7), -100)))
    assert loss.item() == 0
    loss.backward()
    assert tokens.grad is not None
    assert tokens.grad.abs().sum() == 0


def test_used_tokens_survive_a_checkpoint() -> None:
    term, other = MaskedLanguage(WIDTH, VOCABULARY, USED), MaskedLanguage(WIDTH, VOCABULARY, USED + 1)
    other.load_state_dict(term.state_dict())
    assert term.index is not None
    assert other.index is not None
    assert torch.equal(other.index, term.index)


def test_without_the_masked_view(labels: Tensor, tokens: Tensor) -> None:
    term = MaskedLanguage(WIDTH, VOCABULARY)
    with pytest.raises(ValueError, match="needs the masked text view"):
        term(features(), batch(labels=labels))
    with pytest.raises(ValueError, match="needs the masked text view"):
        term(features(text_tokens={"masked": tokens}), batch())
