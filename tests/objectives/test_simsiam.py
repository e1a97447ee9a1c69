"""SimSiam against plain loops."""

from __future__ import annotations

import pytest
import torch
from made import batch, cosine, features

from declip.objectives.simsiam import SimSiam, negative_cosine


def test_negative_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 6, 4, generator=generator).requires_grad_()
    expected = -sum(cosine(prediction[i], target[i]) for i in range(6)) / 6
    assert negative_cosine(prediction, target).item() == pytest.approx(expected, rel=1e-5)
    assert negative_cosine(target, 3 * target).item() == pytest.approx(-1)
    assert negative_cosine(target, -target).item() == pytest.approx(1)


def test_no_gradient_to_the_target() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(6, 4, generator=generator).requires_grad_()
    target = torch.randn(6, 4, generator=generator).requires_grad_()
    negative_cosine(prediction, target).backward()
    assert prediction.grad is not None
    assert target.grad is None


def test_term_like_naive() -> None:
    """Each view predicts the other; batch norm sees one view at a time."""
    torch.manual_seed(0)
    term, made = SimSiam(dim=8, width=16, bottleneck=4), features()
    loss = term(made, batch())
    projected = [term.projector(view) for view in made.image]
    predicted = [term.predictor(view) for view in projected]
    one = sum(cosine(predicted[0][i], projected[1][i]) for i in range(5)) / 5
    other = sum(cosine(predicted[1][i], projected[0][i]) for i in range(5)) / 5
    assert loss.item() == pytest.approx(-(one + other) / 2, rel=1e-5)
    assert -1 <= loss.item() <= 1


def test_texts_and_scale_get_no_gradient() -> None:
    torch.manual_seed(0)
    term, made = SimSiam(dim=8, width=16, bottleneck=4), features()
    term(made, batch()).backward()
    assert made.image.grad is not None
    assert (made.image.grad.abs().sum((1, 2)) > 0).all()
    assert made.logit_scale.grad is None
    assert all(text.grad is None for text in made.text.values())
    assert all(parameter.grad is not None for parameter in term.parameters())


def test_agreeing_views_with_a_perfect_predictor_cost_minus_one() -> None:
    torch.manual_seed(0)
    term, made = SimSiam(dim=8, width=16, bottleneck=4), features(images=1)
    term.predictor = torch.nn.Identity()  # type: ignore[assignment]
    made.image.data = made.image.data.repeat(2, 1, 1)
    assert term(made, batch()).item() == pytest.approx(-1)
