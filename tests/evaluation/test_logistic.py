"""Logistic regression beside scikit-learn's, and each of its short cuts beside the long way."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from declip.errors import InputError
from declip.evaluation import logistic
from declip.evaluation.logistic import LogisticFit, LogisticProblem

STRENGTHS = (1e-6, 1e-3, 1e-1, 1.0, 30.0, 1e4)


def clustered(
    rows: int, width: int = 24, classes: int = 5, seed: int = 0, overlap: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Classes around means far from the origin, with a falling spectrum, as embeddings have: float64."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, width + 1, dtype=torch.float64) ** -0.7
    means = torch.randn(classes, width, generator=draw, dtype=torch.float64) * spread
    labels = torch.randint(classes, (rows,), generator=draw)
    noise = torch.randn(rows, width, generator=draw, dtype=torch.float64) * spread
    return 3 * means[labels] + 3 * overlap * noise + 5, labels


def objective(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, strength: float) -> float:
    logits = features.double() @ weight.double().T + bias.double()
    entropy = F.cross_entropy(logits, labels, reduction="sum")
    return float(entropy + strength / 2 * weight.double().square().sum())


def scikit_learn(
    features: Tensor, labels: Tensor, strength: float, tol: float, solver: str = "newton-cg"
) -> tuple[Tensor, Tensor]:
    """Its L-BFGS stops where the objective hardly falls; Newton's method goes on to the minimum."""
    model = LogisticRegression(C=1 / strength, max_iter=5000, tol=tol, solver=solver)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of small strengths, that it did not converge
        model.fit(features.numpy(), labels.numpy())
    return torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)


def of_fit(fit: LogisticFit, row: int, features: Tensor, labels: Tensor, strength: float) -> float:
    return objective(features, labels, fit.weight[row], fit.bias[row], strength)


@pytest.mark.parametrize("tol", [1e-4, 1e-7])
def test_no_objective_is_above_scikit_learns(tol: float) -> None:
    features, labels = clustered(400)
    fit = LogisticProblem(features, labels, 5).solve(torch.tensor(STRENGTHS, dtype=torch.float64), tolerance=tol * 1e-6)
    assert fit.converged.all()
    for row, strength in enumerate(STRENGTHS):
        theirs = objective(features, labels, *scikit_learn(features, labels, strength, tol, "lbfgs"), strength)
        ours = of_fit(fit, row, features, labels, strength)
        assert ours <= theirs * (1 + 1e-6), strength
        assert ours == pytest.approx(float(fit.objective[row]), rel=1e-9)


@pytest.mark.parametrize("strength", [1e-1, 1.0, 30.0, 1e4])
def test_coefficients_are_scikit_learns(strength: float) -> None:
    features, labels = clustered(400)
    fit = LogisticProblem(features, labels, 5).solve(torch.tensor([strength]), tolerance=1e-14)
    weight, bias = scikit_learn(features, labels, strength, 1e-9)
    size = float(weight.abs().max())
    torch.testing.assert_close(fit.weight[0], weight, rtol=1e-3, atol=1e-4 * size)
    # Intercepts are known up to a constant.
    torch.testing.assert_close(fit.bias[0] - fit.bias[0].mean(), bias - bias.mean(), rtol=1e-3, atol=1e-3 * size)


def test_two_classes_are_scikit_learns_at_half_the_strength() -> None:
    features, labels = clustered(300, classes=2)
    fit = LogisticProblem(features, labels, 2).solve(torch.tensor([2.0]), tolerance=1e-14)
    weight, _ = scikit_learn(features, labels, 1.0, 1e-9)
    torch.testing.assert_close(fit.weight[0, 1] - fit.weight[0, 0], weight[0], rtol=1e-3, atol=1e-4)


# At weaker ones these rows are separable, and scikit-learn's own two solvers differ by more than this.
@pytest.mark.parametrize("strength", [1e-2, 1.0, 100.0, 1e6])
def test_accuracy_is_that_of_scikit_learn(strength: float) -> None:
    features, labels = clustered(3000, overlap=1.5)
    train, test = slice(0, 1000), slice(1000, None)
    single = features.float()
    fit = LogisticProblem(single[train], labels[train], 5).solve(torch.tensor([strength]))
    weight, bias = scikit_learn(features[train], labels[train], strength, 1e-8)
    ours = (fit.scores(single[test], 0).argmax(1) == labels[test]).double().mean()
    theirs = ((features[test] @ weight.T + bias).argmax(1) == labels[test]).double().mean()
    assert abs(float(ours - theirs)) <= 0.002


def test_a_batch_is_each_strength_alone() -> None:
    features, labels = clustered(300)
    problem = LogisticProblem(features, labels, 5)
    together = problem.solve(torch.tensor(STRENGTHS), tolerance=1e-10)
    for row, strength in enumerate(STRENGTHS):
        alone = problem.solve(torch.tensor([strength]), tolerance=1e-10)
        assert int(alone.iterations[0]) == pytest.approx(int(together.iterations[row]), abs=2)
        torch.testing.assert_close(alone.objective[0], together.objective[row], rtol=1e-6, atol=0)
        torch.testing.assert_close(alone.weight[0], together.weight[row], rtol=1e-2, atol=1e-3)


def test_chunks_of_rows_and_groups_of_strengths_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clustered(301)
    problem = LogisticProblem(features, labels, 5)
    weights = torch.randn(len(STRENGTHS), 5, 25, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    strengths = torch.tensor(STRENGTHS, dtype=torch.float64)
    whole, fit = problem.objective(weights, strengths), problem.solve(strengths)
    monkeypatch.setitem(logistic._LOGITS_AT_ONCE, "cpu", 1000)
    for ours, expected in zip(problem.objective(weights, strengths), whole, strict=True):
        torch.testing.assert_close(ours, expected)
    monkeypatch.setattr(logistic, "_PAIRS_AT_ONCE", 1)
    torch.testing.assert_close(problem.solve(strengths).objective, fit.objective, rtol=1e-4, atol=0)


def test_the_gradient_is_autograds() -> None:
    features, labels = clustered(100)
    problem = LogisticProblem(features, labels, 5)
    strengths = torch.tensor([0.3, 7.0], dtype=torch.float64)
    weights = torch.randn(2, 5, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    logits = torch.einsum("rw,scw->src", problem.rows, weights)
    values = torch.stack([F.cross_entropy(each, labels, reduction="sum") for each in logits])
    values = values + strengths / 2 * weights[..., :-1].square().sum((1, 2))
    (expected,) = torch.autograd.grad(values.sum(), weights)
    value, gradient = problem.objective(weights.detach(), strengths)
    torch.testing.assert_close(value, values.detach())
    torch.testing.assert_close(gradient, expected)


def test_float32_finds_the_minimum_of_float64() -> None:
    features, labels = clustered(500)
    fits = [LogisticProblem(given, labels, 5).solve(torch.tensor(STRENGTHS)) for given in (features, features.float())]
    assert fits[1].weight.dtype == torch.float32
    assert fits[1].converged.all()
    # float32 knows the cross-entropy of a row to about 1e-6 at best.
    torch.testing.assert_close(fits[1].objective, fits[0].objective, rtol=1e-3, atol=1e-6 * len(labels))


def test_the_first_rows_alone_and_a_start_from_the_solution() -> None:
    features, labels = clustered(400)
    strengths = torch.tensor([0.1, 10.0])
    whole, part = LogisticProblem(features, labels, 5), LogisticProblem(features[:250], labels[:250], 5)
    expected = part.solve(strengths, tolerance=1e-12)
    found = whole.first(250).solve(strengths, tolerance=1e-12)
    torch.testing.assert_close(found.objective, expected.objective)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-2, atol=1e-4)
    assert part.solve(strengths, (found.weight, found.bias), tolerance=1e-11).iterations.tolist() == [0, 0]


def test_more_features_than_rows_a_constant_one_and_a_class_without_rows() -> None:
    features, labels = clustered(30, width=60, classes=3)
    features[:, 7] = 2.0
    fit = LogisticProblem(features, labels, 4).solve(torch.tensor([1e-3, 1.0]))
    assert fit.converged.all()
    assert (fit.scores(features, 1).argmax(1) == labels).all()


def test_what_ends_early_says_so() -> None:
    features, labels = clustered(300)
    fit = LogisticProblem(features, labels, 5).solve(torch.tensor([1e-3, 1e5]), max_iterations=3)
    assert fit.converged.tolist() == [False, True]
    assert int(fit.iterations[0]) == 3


def test_what_cannot_be_solved() -> None:
    features, labels = clustered(20)
    with pytest.raises(ValueError, match="20 rows need one class each"):
        LogisticProblem(features, labels[:3], 5)
    with pytest.raises(ValueError, match="outside the 2 classes"):
        LogisticProblem(features, labels, 2)
    with pytest.raises(ValueError, match="above 0"):
        LogisticProblem(features, labels, 5).solve(torch.tensor([0.0, 1.0]))
    with pytest.raises(InputError, match="too large"):
        LogisticProblem(features.float() * np.float32(1e20), labels, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same() -> None:
    features, labels = clustered(500)
    here = LogisticProblem(features.float(), labels, 5).solve(torch.tensor(STRENGTHS))
    there = LogisticProblem(features.float().cuda(), labels, 5).solve(torch.tensor(STRENGTHS))
    torch.testing.assert_close(there.objective.cpu(), here.objective, rtol=1e-3, atol=1e-6 * len(labels))
