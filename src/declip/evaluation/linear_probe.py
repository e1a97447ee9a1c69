"""Linear probe: how well a linear classifier on frozen image features does, by the protocol of CLIP.

Radford et al. 2021, section 3.2 and appendix A.3: multinomial logistic regression by L-BFGS, at most 1,000 iterations;
the L2 strength is searched for on a validation split, and the final classifier is fitted to train and validation
together. The paper's sweep has 96 logarithmic steps between 1e-6 and 1e6, eight a decade, of which a parametric binary
search tries few.

CLIP takes the features of its ViTs before their projection into the joint space, does not normalise them, and those of
other models from the layer before their classifier. This module takes whatever features it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from declip.errors import InputError
from declip.evaluation.logistic import LogisticProblem
from declip.evaluation.retrieval import not_below
from declip.evaluation.zero_shot import metrics_of_ranks

Sweep = Literal["search", "grid"]

SHOTS = (1, 2, 4, 8, 16)
VALIDATION_SHARE = 0.2  # of each class of train, where there is no validation split
MAX_ITERATIONS = 1000
# The strengths that can be chosen: 10^-6 to 10^6, in eighths of a decade.
STRENGTHS = tuple(10 ** (step / 8 - 6) for step in range(97))
_FIRST_STEP = 16  # of the search: every two decades
_GRID_AT_ONCE = 16
_FEW_SHOT_VALIDATION = 4  # a class, at most


@dataclass(frozen=True)
class Features:
    """Embeddings, floating point ``[items, width]``, and classes int64 ``[items]``."""

    embeddings: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.embeddings)

    def take(self, rows: Tensor) -> Features:
        return Features(self.embeddings[rows], self.labels[rows])


@dataclass(frozen=True)
class ProbeResult:
    """What a probe says of each test item, and how it came about.

    scores: logits ``[items, classes]`` on the CPU; -inf for classes that no fitted item has.
    labels: int64 ``[items]``.
    strength: the chosen lambda.
    curve: validation accuracy in percent of each lambda that was tried, in ascending order of lambda.
    converged: whether the final fit did within 1,000 iterations.
    """

    scores: Tensor
    labels: Tensor
    strength: float
    curve: dict[float, float]
    converged: bool

    @property
    def ranks(self) -> Tensor:
        """How many classes stand above the right one or tie with it: int64 ``[items]``.

        An item whose class no fitted item has is wrong, also among five classes: its rank is the number of classes.
        """
        right = self.scores.gather(1, self.labels[:, None])
        ranks = not_below(self.scores, right).sum(1) - 1
        return ranks.masked_fill(right[:, 0].isneginf(), self.scores.shape[1])

    @property
    def predictions(self) -> Tensor:
        """The class of the highest score: int64 ``[items]``."""
        return self.scores.argmax(1)

    @property
    def metrics(self) -> dict[str, float]:
        """``top1``, ``top5`` (top-all with fewer than five classes) and ``mean_per_class`` (of top1), in percent."""
        return metrics_of_ranks(self.ranks, self.labels, self.scores.shape[1])


def linear_probe(
    train: Features,
    test: Features,
    validation: Features | None = None,
    *,
    classes: int,
    sweep: Sweep = "search",
    seed: int = 0,
    device: str | torch.device | None = None,
) -> ProbeResult:
    """Fit on train, choose the strength on validation, fit on both, judge on test.

    Args:
        train, test, validation: features of one width. Without validation a fifth of each class of train, drawn by
            ``seed``, takes its place; a class of one item stays in train.
        classes: how many there are. A class of test that neither train nor validation has counts as wrong.
        sweep: ``search``, CLIP's binary search (15 strengths), or ``grid``, all 97 of ``STRENGTHS``. Among strengths
            with the same validation accuracy the middle one is chosen: few validation items leave many equal.
        device: where to compute; by default where train's embeddings are. float64 is computed in float64, all else in
            float32.

    Raises InputError where a set is empty, has labels that do not fit or features that are not finite, where widths
    differ, or where train has fewer than two classes.
    """
    train, test, validation = _checked(train, test, validation, classes, device)
    if validation is None:
        counts = torch.bincount(train.labels, minlength=classes)
        held = (counts * VALIDATION_SHARE).round().long().clamp(min=1).minimum((counts - 1).clamp(min=0))
        rows, rest = _draw(train.labels, held, seed)
        if not len(rows):
            raise InputError(
                "Each class of train has one item only: give a validation split to choose the strength on."
            )
        train, validation = train.take(rest), train.take(rows)
    return _probe(train, test, validation, classes, sweep, final_on_both=True)


@dataclass(frozen=True)
class FewShotResult:
    """Probes fitted on ``shots`` items a class, one for each seed."""

    shots: int
    runs: list[ProbeResult]


def few_shot(
    train: Features,
    test: Features,
    validation: Features | None = None,
    *,
    classes: int,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = (0, 1, 2),
    sweep: Sweep = "search",
    device: str | torch.device | None = None,
) -> list[FewShotResult]:
    """Linear probes on k items a class, for each k of ``shots`` and each seed.

    CLIP does not say how it chose the strength here; this follows the linear probe of CoOp (Zhou et al. 2022): it is
    chosen on min(k, 4) items a class, from validation or, without one, from the items of train that were not drawn. The
    final classifier is fitted to the k items alone. A seed's items of a smaller k are among those of its greater ones.

    Arguments and errors are those of ``linear_probe``; raises InputError also where a class of train has too few items.
    A class that train lacks altogether is left out, and counts as wrong.
    """
    train, test, validation = _checked(train, test, validation, classes, device)
    counts = torch.bincount(train.labels, minlength=classes)
    results = []
    for k in shots:
        extra = min(k, _FEW_SHOT_VALIDATION)
        need = k if validation is not None else k + extra
        for short in ((counts > 0) & (counts < need)).nonzero()[:, 0].tolist():
            what = f"{need} ({k} to train on and {extra} to choose the strength on)" if need > k else f"{k}"
            raise InputError(
                f"Class {short} of train has {int(counts[short])} items, and {k} shots need {what}: "
                "take fewer shots, or leave the class out."
            )
        runs = []
        for seed in seeds:
            rows, rest = _draw(train.labels, counts.clamp(max=k), seed)
            pool = train.take(rest) if validation is None else validation
            judged, _ = _draw(pool.labels, torch.bincount(pool.labels, minlength=classes).clamp(max=extra), seed)
            runs.append(_probe(train.take(rows), test, pool.take(judged), classes, sweep, final_on_both=False))
        results.append(FewShotResult(k, runs))
    return results


def _checked(
    train: Features, test: Features, validation: Features | None, classes: int, device: str | torch.device | None
) -> tuple[Features, Features, Features | None]:
    """The sets on their device, embeddings in one dtype; raises InputError where they do not fit."""
    where = train.embeddings.device if device is None else torch.device(device)
    dtype = torch.float64 if train.embeddings.dtype == torch.float64 else torch.float32

    def checked(name: str, features: Features) -> Features:
        _check(name, features, train.embeddings.shape[-1], classes)
        return Features(features.embeddings.to(where, dtype), features.labels.to(where))

    train, test = checked("train", train), checked("test", test)
    if (train.labels == train.labels[0]).all():
        raise InputError(f"All of train is of class {int(train.labels[0])}: a probe needs at least two classes.")
    return train, test, None if validation is None else checked("validation", validation)


def _check(name: str, features: Features, width: int, classes: int) -> None:
    embeddings, labels = features.embeddings, features.labels
    if embeddings.ndim != 2 or not len(embeddings) or embeddings.shape[1] != width:
        raise InputError(
            f"The embeddings of {name} have the shape {tuple(embeddings.shape)}: give [items, {width}], as train has."
        )
    if labels.shape != (len(embeddings),):
        raise InputError(f"{name} has {len(embeddings)} embeddings and {len(labels)} labels: give one label for each.")
    if labels.dtype != torch.int64 or labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"The labels of {name} must be int64 from 0 to {classes - 1}: check them or the class count.")
    broken = (~embeddings.isfinite().all(1)).nonzero()[:, 0]
    if len(broken):
        raise InputError(
            f"{len(broken)} of the {len(embeddings)} embeddings of {name} have NaN or infinity, "
            f"the first in row {int(broken[0])}: leave them out, or look for what is wrong with the model or images."
        )


def _draw(labels: Tensor, counts: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """So many items of each class, drawn by the seed: their rows and the others', both ascending.

    counts is int64 ``[classes]``. The same seed with greater counts draws the same items and more.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    order = order[labels[order].argsort(stable=True)]
    sizes = torch.bincount(labels, minlength=len(counts))
    own = labels[order]
    position = torch.arange(len(labels), device=labels.device) - (sizes.cumsum(0) - sizes)[own]
    drawn = position < counts[own]
    return order[drawn].sort().values, order[~drawn].sort().values


def _probe(
    train: Features, test: Features, validation: Features, classes: int, sweep: Sweep, final_on_both: bool
) -> ProbeResult:
    embeddings, labels = (
        torch.cat([getattr(train, name), getattr(validation, name)]) for name in ("embeddings", "labels")
    )
    # The fit knows only the classes that are there: others would cost time, and their intercepts have no minimum.
    fitted = torch.bincount(labels if final_on_both else train.labels, minlength=classes).nonzero()[:, 0]
    of_class = fitted.new_zeros(classes)
    of_class[fitted] = torch.arange(len(fitted), device=fitted.device)
    both = LogisticProblem(embeddings, of_class[labels], len(fitted))
    search = _Sweep(both.first(len(train)), validation, fitted)
    best = search.grid() if sweep == "grid" else search.search()
    weight, bias, converged = search.solutions[best]
    if final_on_both:
        strength = weight.new_tensor([STRENGTHS[best]])
        fit = both.solve(strength, (weight[None], bias[None]), max_iterations=MAX_ITERATIONS)
        weight, bias, converged = fit.weight[0], fit.bias[0], bool(fit.converged[0])
    scores = weight.new_full((len(test), classes), -torch.inf)
    scores[:, fitted] = torch.addmm(bias, test.embeddings, weight.T)
    curve = {STRENGTHS[step]: search.accuracy[step] for step in sorted(search.accuracy)}
    return ProbeResult(scores.cpu(), test.labels.cpu(), STRENGTHS[best], curve, converged)


class _Sweep:
    """Fits at strengths, named by their index in STRENGTHS, judged on validation; ``fitted``: the problem's classes."""

    def __init__(self, problem: LogisticProblem, validation: Features, fitted: Tensor) -> None:
        self.problem = problem
        self.validation = validation
        self.fitted = fitted
        self.accuracy: dict[int, float] = {}
        self.solutions: dict[int, tuple[Tensor, Tensor, bool]] = {}

    def search(self) -> int:
        """Every two decades; then the peak's neighbours at half the step, down to an eighth of a decade."""
        step = _FIRST_STEP
        best = self._round(list(range(0, len(STRENGTHS), step)))
        while step > 1:
            step //= 2
            near = (best - step, best + step)
            best = self._round([index for index in near if 0 <= index < len(STRENGTHS)])
        return best

    def grid(self) -> int:
        """All of them, from the strongest, so that each group starts near its solution."""
        steps = list(reversed(range(len(STRENGTHS))))
        for start in range(0, len(steps), _GRID_AT_ONCE):
            best = self._round(steps[start : start + _GRID_AT_ONCE])
        return best

    def _round(self, steps: list[int]) -> int:
        """Fit at those strengths in one batch; the best of all so far, the middle one among equals."""
        strengths = torch.tensor([STRENGTHS[step] for step in steps])
        start = None
        if self.solutions:
            weights, biases = zip(*(self._between(step) for step in steps), strict=True)
            start = torch.stack(weights), torch.stack(biases)
        fit = self.problem.solve(strengths, start, max_iterations=MAX_ITERATIONS)
        for row, step in enumerate(steps):
            right = self.fitted[fit.scores(self.validation.embeddings, row).argmax(1)] == self.validation.labels
            self.accuracy[step] = 100.0 * int(right.sum()) / len(right)
            self.solutions[step] = fit.weight[row], fit.bias[row], bool(fit.converged[row])
        peak = max(self.accuracy.values())
        best = sorted(step for step, accuracy in self.accuracy.items() if accuracy == peak)
        return best[len(best) // 2]

    def _between(self, step: int) -> tuple[Tensor, Tensor]:
        """Between the solutions at the nearest weaker and the nearest stronger one, to start from."""
        lower = max((known for known in self.solutions if known < step), default=min(self.solutions))
        upper = min((known for known in self.solutions if known > step), default=lower)
        share = (step - lower) / (upper - lower) if lower < step < upper else 0.0
        low, high = self.solutions[lower], self.solutions[upper]
        return low[0].lerp(high[0], share), low[1].lerp(high[1], share)
