"""Multinomial logistic regression at many L2 strengths at once, by a batched and preconditioned L-BFGS.

For features ``x_i``, classes ``y_i`` and each strength ``lambda`` this minimises over ``W`` and ``b``

    sum_i cross_entropy(W x_i + b, y_i) + lambda / 2 * ||W||^2

which is scikit-learn's ``LogisticRegression(C=1 / lambda)`` for three classes and more; its form for two classes has
one weight vector ``W_1 - W_0``, so that there the same solution has ``C = 2 / lambda``. The intercept ``b`` is not
penalised.

What makes it fast: the strengths share the features, so that a step of all is two matrix products; and the features
are centred and turned into the basis of their principal axes. Neither changes the problem (``b`` takes up the shift, a
rotation leaves ``||W||`` as it is), but there ``alpha * X'X + lambda``, an approximation of the curvature for any class
and strength, is diagonal: L-BFGS (Liu and Nocedal 1989) starts from its inverse, and needs a fraction of the steps.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from declip.errors import InputError
from declip.evaluation.retrieval import chunks
from declip.model.products import product

# At most so many logits at once: what stays in a CPU's caches, what keeps a GPU busy.
_LOGITS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
# Strengths are solved together as long as their L-BFGS pairs have fewer numbers than this.
_PAIRS_AT_ONCE = 2**27
_PAIRS_KEPT = 10
_BACKTRACKS = 20
_ENOUGH = 1e-4  # of the decrease that the slope promises (Armijo)
_RELATIVE = 100  # times the tolerance: of the objective


@dataclass(frozen=True)
class LogisticFit:
    """Solutions at a batch of strengths, on the features' device.

    weight ``[strengths, classes, width]`` and bias ``[strengths, classes]`` have the features' dtype, objective is
    float64 ``[strengths]``, iterations int64 ``[strengths]``, converged bool ``[strengths]``.
    """

    weight: Tensor
    bias: Tensor
    objective: Tensor
    iterations: Tensor
    converged: Tensor

    def scores(self, features: Tensor, strength: int) -> Tensor:
        """Logits ``[items, classes]`` of features ``[items, width]`` at the strength with that index."""
        return torch.addmm(self.bias[strength], features, self.weight[strength].T)


class LogisticProblem:
    """The features in the basis of their principal axes: made once, solved at any strengths.

    Args:
        features: float32 or float64 ``[rows, width]``, finite.
        labels: int64 ``[rows]``, the class of each row.
        classes: how many there are; one without a row ends with a low intercept.

    Takes as much memory again as the features. Raises ValueError where labels do not fit, InputError where features are
    so large that their squares overflow.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        rows, width = features.shape
        if not rows or labels.shape != (rows,):
            raise ValueError(f"{rows} rows need one class each, not {tuple(labels.shape)}")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"a label points outside the {classes} classes")
        self.classes = classes
        self.labels = labels.to(features.device)
        self.mean = features.mean(0, dtype=torch.float64).to(features.dtype)
        centred = features - self.mean
        spread = product(centred.T, centred).double()
        if not spread.isfinite().all():
            raise InputError("The features are too large for their squares to be computed: divide them by a constant.")
        variances, axes = torch.linalg.eigh(spread)
        self.axes = axes.to(features.dtype)
        # The last column belongs to the intercept.
        self.rows = features.new_ones(rows, width + 1)
        for part in chunks(rows, width, _LOGITS_AT_ONCE["cpu"] // width + 1):
            self.rows[part, :-1] = product(centred[part], self.axes)
        self.spread = torch.cat([variances.clamp(min=0), variances.new_tensor([rows])]).to(features.dtype)

    def first(self, rows: int) -> LogisticProblem:
        """The problem of the first rows alone, in the same basis and memory."""
        part = copy.copy(self)
        part.rows, part.labels = self.rows[:rows], self.labels[:rows]
        part.spread = self.spread * (rows / len(self.rows))
        return part

    def solve(
        self,
        strengths: Tensor,
        start: tuple[Tensor, Tensor] | None = None,
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
    ) -> LogisticFit:
        """The minimum at each strength.

        Args:
            strengths: ``[strengths]``, each above 0.
            start: weight ``[strengths, classes, width]`` and bias ``[strengths, classes]`` near the solution; by
                default zero, and the logarithm of the classes' shares.
            tolerance: a strength is done when its gradient, measured by the inverse curvature (half of g'H⁻¹g, which
                near the minimum is how far the objective lies above it), is below this in nats a row, and below 100
                times this as a share of the objective: of separable classes, every row's share of it is tiny.
            max_iterations: steps of L-BFGS after which a strength is given up: ``converged`` is False there.

        Raises ValueError where a strength is not above 0.
        """
        if not len(strengths) or not (strengths > 0).all():
            raise ValueError(f"strengths must be above 0, not {strengths.tolist()}")
        strengths = strengths.to(self.rows)
        weights = self._prior(len(strengths)) if start is None else self._turned(*start)
        together = max(1, _PAIRS_AT_ONCE // (2 * _PAIRS_KEPT * weights[0].numel()))
        solved = [
            _minimise(self, strengths[part], weights[part], tolerance, max_iterations)
            for part in chunks(len(strengths), 1, together)
        ]
        turned, objective, iterations, converged = (torch.cat(column) for column in zip(*solved, strict=True))
        weight = turned[..., :-1] @ self.axes.T
        return LogisticFit(weight, turned[..., -1] - weight @ self.mean, objective, iterations, converged)

    def _prior(self, strengths: int) -> Tensor:
        weights = self.rows.new_zeros(strengths, self.classes, self.rows.shape[1])
        counts = torch.bincount(self.labels, minlength=self.classes).to(weights)
        weights[..., -1] = (counts.clamp(min=0.5) / len(self.rows)).log()
        return weights

    def _turned(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Weights in the basis of the axes, with the intercept as last column."""
        return torch.cat([weight @ self.axes, (bias + weight @ self.mean)[..., None]], -1)

    def objective(self, weights: Tensor, strengths: Tensor) -> tuple[Tensor, Tensor]:
        """Value float64 ``[strengths]`` and gradient of weights ``[strengths, classes, width + 1]`` in that basis."""
        count, classes, width = weights.shape
        flat, gradient = weights.view(-1, width), torch.zeros_like(weights)
        value = torch.zeros(count, dtype=torch.float64, device=weights.device)
        step = max(1, _LOGITS_AT_ONCE.get(weights.device.type, 2**24) // len(flat))
        # Classes before rows: then reductions over classes run along whole rows of memory, however few they are.
        for part in chunks(len(self.rows), len(flat), step):
            rows, labels = self.rows[part], self.labels[part]
            logits = product(flat, rows.T).view(count, classes, len(rows))
            own = labels.expand(count, 1, -1)
            logits -= logits.amax(1, keepdim=True)
            value -= logits.gather(1, own).sum((1, 2), dtype=torch.float64)
            total = logits.exp_().sum(1, keepdim=True)
            value += total.log().sum((1, 2), dtype=torch.float64)
            logits /= total
            logits.scatter_add_(1, own, torch.full_like(total, -1))
            gradient.view(-1, width).add_(product(logits.view(-1, len(rows)), rows))
        penalised = weights[..., :-1]
        value += strengths / 2 * penalised.square().sum((1, 2), dtype=torch.float64)
        gradient[..., :-1] += strengths[:, None, None] * penalised
        return value, gradient


@dataclass
class _State:
    """The strengths that are not done yet: all tensors have them in their first dimension."""

    index: Tensor  # of each strength in the batch
    strengths: Tensor
    weights: Tensor
    value: Tensor
    gradient: Tensor
    # Steps, gradient differences and one over their products: the newest last.
    pairs: deque[tuple[Tensor, Tensor, Tensor]] = field(default_factory=lambda: deque(maxlen=_PAIRS_KEPT))

    def keep(self, rows: Tensor) -> None:
        for name in ("index", "strengths", "weights", "value", "gradient"):
            setattr(self, name, getattr(self, name)[rows])
        self.pairs = deque(((s[rows], y[rows], r[rows]) for s, y, r in self.pairs), maxlen=_PAIRS_KEPT)


def _minimise(
    problem: LogisticProblem, strengths: Tensor, weights: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L-BFGS from those weights: weights, objectives, iterations, converged."""
    state = _State(
        torch.arange(len(strengths), device=weights.device),
        strengths,
        weights,
        *problem.objective(weights, strengths),
    )
    weights, objective = weights.clone(), state.value.clone()
    iterations = torch.full_like(state.index, max_iterations)
    converged = torch.zeros_like(iterations, dtype=torch.bool)
    stuck = torch.zeros_like(converged)
    for iteration in range(max_iterations + 1):
        direction = _direction(state, _inverse_spread(problem, state))
        slope = _dot(state.gradient, direction)
        gap = torch.maximum((state.value * _RELATIVE).clamp(max=len(problem.rows)) * tolerance, _noise(problem, state))
        near = -slope / 2 <= gap
        done = near | stuck | (iteration == max_iterations)
        if done.any():
            index = state.index[done]
            weights[index], objective[index] = state.weights[done], state.value[done]
            iterations[index], converged[index] = iteration, near[done]
            if done.all():
                break
            state.keep(~done)
            direction, slope = direction[~done], slope[~done]
        stuck = _advance(problem, state, direction, slope)
    return weights, objective, iterations, converged


def _noise(problem: LogisticProblem, state: _State) -> Tensor:
    """What rounding does to the objectives at most: no step is held up by it, and below it there is nothing to gain."""
    return torch.finfo(state.weights.dtype).eps * (state.value + len(problem.rows))


def _inverse_spread(problem: LogisticProblem, state: _State) -> Tensor:
    """The preconditioner's diagonal ``[strengths, 1, width + 1]``: 1 / (alpha * X'X + lambda).

    alpha stands for the mean of p (1 - p). It is that where nothing is learnt yet, and falls with the objective: where
    most rows are right, the mean over classes of p (1 - p) is about twice the cross-entropy.
    """
    classes, count = problem.classes, len(problem.rows)
    alpha = (2 * state.value / (count * classes)).clamp(max=(classes - 1) / classes**2).to(state.weights)
    penalty = state.strengths[:, None, None].repeat(1, 1, problem.rows.shape[1])
    penalty[..., -1] = 0
    return 1 / (_scaled(alpha, problem.spread) + penalty)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The product of each strength's tensors: ``[strengths]``."""
    product: Tensor = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
    return product


def _scaled(factors: Tensor, tensor: Tensor) -> Tensor:
    return factors[:, None, None] * tensor


def _direction(state: _State, inverse_spread: Tensor) -> Tensor:
    """The two loops of L-BFGS (Nocedal and Wright, algorithm 7.4)."""
    direction = -state.gradient
    shares = []
    for step, change, over in reversed(state.pairs):
        share = over * _dot(step, direction)
        direction -= _scaled(share, change)
        shares.append(share)
    direction *= inverse_spread
    if state.pairs:
        _, change, over = state.pairs[-1]
        scale = over * _dot(change, inverse_spread * change)
        direction *= torch.where(scale > 0, 1 / scale, 1)[:, None, None]
    for (step, change, over), share in zip(state.pairs, reversed(shares), strict=True):
        direction += _scaled(share - over * _dot(change, direction), step)
    return direction


def _advance(problem: LogisticProblem, state: _State, direction: Tensor, slope: Tensor) -> Tensor:
    """Go along the direction, backtracking until the objective falls enough; which strengths could not: bool.

    The problem is convex, so that any step has a pair of positive product: there is no second Wolfe condition to watch.
    """
    noise = _noise(problem, state)
    length = torch.ones_like(slope)
    weights = state.weights + direction
    value, gradient = problem.objective(weights, state.strengths)
    for _ in range(_BACKTRACKS):
        short = ~(value <= state.value + _ENOUGH * length * slope + noise)
        if not short.any():
            break
        # The minimum of the parabola through both values and the slope.
        rise = (value - state.value - length * slope)[short]
        best = -slope[short] * length[short].square() / (2 * rise)
        length[short] = torch.maximum(torch.minimum(best, length[short] / 2), length[short] / 10).to(length)
        weights[short] = state.weights[short] + _scaled(length[short], direction[short])
        value[short], gradient[short] = problem.objective(weights[short], state.strengths[short])
    stuck = ~(value <= state.value + noise)
    step, change = weights - state.weights, gradient - state.gradient
    product = _dot(step, change)
    state.pairs.append((step, change, torch.where(product > 0, 1 / product, 0)))
    kept = stuck[:, None, None]
    state.weights = torch.where(kept, state.weights, weights)
    state.gradient = torch.where(kept, state.gradient, gradient)
    state.value = torch.where(stuck, state.value, value)
    return stuck
