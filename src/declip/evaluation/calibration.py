"""Whether a classifier's confidence is right: of the answers given with 80 %, are 80 % right?"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from declip.evaluation.retrieval import chunks

BINS = 15

_COLDEST, _HOTTEST = 1e-4, 1e4  # temperatures that are looked among
_COPIES = 8  # of a block of logits, in float32, that exist at once
_STEPS = 60  # at most; Newton's method takes about ten


class Bin(NamedTuple):
    """Items of like confidence: how many, their mean confidence and the share that is right."""

    items: int
    confidence: float
    accuracy: float


class Calibration(NamedTuple):
    """Errors as shares (0..1) and the mean negative log-likelihood, as given and after a temperature was fitted.

    temperature: the geometric mean of the two halves'.
    """

    temperature: float
    error: float
    error_after: float
    adaptive_error: float
    adaptive_error_after: float
    likelihood: float
    likelihood_after: float


def calibrate(logits: Tensor, labels: Tensor, bins: int = BINS, seed: int = 0) -> Calibration:
    """Calibration error before and after a temperature, which is fitted on items that it is not judged on.

    The items are split into two random halves, each half is judged with the temperature that suits the other, and the
    errors are those of all items together.

    logits: floating ``[n, classes]``, for CLIP the similarities times the logit scale; labels: int64 ``[n]``.
    Raises ValueError of fewer than two items, where a label does not fit, and where logits are not finite.
    """
    _check(logits, labels)
    if len(labels) < 2:
        raise ValueError("calibration takes two items or more: one to fit on, one to judge")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(logits.device)
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    fitted = [fit_temperature(logits[half], labels[half]) for half in halves]
    temperatures = logits.new_empty(len(labels), dtype=torch.float64)
    temperatures[halves[0]], temperatures[halves[1]] = fitted[1], fitted[0]
    before = _judged(logits, labels, torch.ones_like(temperatures))
    after = _judged(logits, labels, temperatures)
    errors = (
        calibration_error(confidence, correct, bins, adaptive)
        for adaptive in (False, True)
        for confidence, correct, _ in (before, after)
    )
    likelihoods = (float(found[2].mean()) for found in (before, after))
    return Calibration(math.sqrt(fitted[0] * fitted[1]), *errors, *likelihoods)


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = BINS, adaptive: bool = False) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3), as a share.

    The mean over items of how far a bin's accuracy lies from its mean confidence. Takes what `reliability` takes.
    """
    found = reliability(confidence, correct, bins, adaptive)
    return sum(one.items * abs(one.accuracy - one.confidence) for one in found) / len(confidence)


def reliability(confidence: Tensor, correct: Tensor, bins: int = BINS, adaptive: bool = False) -> list[Bin]:
    """Items in bins of like confidence, from the least to the most confident; empty bins are left out.

    confidence: floating ``[n]``, 0..1; correct: bool ``[n]``.
    Bins are of equal width, open below and closed above (Guo et al. 2017, section 2); adaptive: of equal numbers of
    items (Nguyen and O'Connor 2015, arXiv:1508.05154), at most one apart.
    Raises ValueError where there is no item or confidence is no share.
    """
    if not len(confidence) or confidence.shape != correct.shape:
        raise ValueError(f"each item has one confidence, not {tuple(confidence.shape)} of {tuple(correct.shape)}")
    if not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise ValueError("confidence must lie between 0 and 1")
    confidence, correct = confidence.double(), correct.double()
    if adaptive:
        place = torch.empty(len(confidence), dtype=torch.int64, device=confidence.device)
        place[confidence.argsort(stable=True)] = torch.arange(len(place), device=place.device) * bins // len(place)
    else:
        place = ((confidence * bins).ceil().long() - 1).clamp(min=0)
    items = torch.bincount(place, minlength=bins)
    sums = (torch.bincount(place, weights=of, minlength=bins).tolist() for of in (confidence, correct))
    return [Bin(n, sure / n, right / n) for n, sure, right in zip(items.tolist(), *sums, strict=True) if n]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """What logits ``[n, classes]`` are best divided by for the least negative log-likelihood (Guo et al., section 4.2).

    The likelihood is concave in the inverse temperature, so Newton's method finds the one optimum; where it leaves the
    interval that holds it, the interval is halved. Temperatures are looked for from 0.0001 to 10,000: the ends are
    returned where every answer is right, or no better than chance. Raises ValueError as `calibrate` does.
    """
    _check(logits, labels)
    low, high = 1 / _HOTTEST, 1 / _COLDEST
    inverse = 1.0
    for _ in range(_STEPS):
        slope, curvature = _derivatives(logits, labels, inverse)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        following = inverse - slope / curvature if curvature > 0 else math.inf
        if not low < following < high:
            following = math.sqrt(low * high)
        if abs(following - inverse) <= 1e-6 * inverse:
            break
        inverse = following
    return 1 / inverse


def _derivatives(logits: Tensor, labels: Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean negative log-likelihood by the inverse temperature.

    The mean of E[z] - z_label, and of the variance of z, over classes as probable as the model holds them.
    """
    slope = curvature = 0.0
    for rows in chunks(len(logits), _COPIES * logits.shape[1]):
        # From the right class's logit on: what is summed is then small where it matters.
        z = logits[rows].double()
        z = z - z.gather(1, labels[rows, None])
        probable = (inverse * z).softmax(1)
        mean = (probable * z).sum(1)
        slope += float(mean.sum())
        curvature += float((probable * (z - mean[:, None]) ** 2).sum())
    return slope / len(labels), curvature / len(labels)


def _judged(logits: Tensor, labels: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence, whether it is right, and negative log-likelihood of each item."""
    parts = []
    for rows in chunks(len(logits), _COPIES * logits.shape[1]):
        probable = (logits[rows].double() / temperatures[rows, None]).log_softmax(1)
        best, answer = probable.max(1)
        parts.append((best.exp().clamp(max=1), answer == labels[rows], -probable.gather(1, labels[rows, None])[:, 0]))
    confidence, correct, likelihood = (torch.cat(part) for part in zip(*parts, strict=True))
    return confidence, correct, likelihood


def _check(logits: Tensor, labels: Tensor) -> None:
    if not len(labels) or logits.ndim != 2 or labels.shape != (len(logits),):
        raise ValueError(f"logits {tuple(logits.shape)} need one label a row, not {tuple(labels.shape)}")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"a label points outside the {logits.shape[1]} classes")
    if not bool(logits.isfinite().all()):
        raise ValueError("logits are not finite")
