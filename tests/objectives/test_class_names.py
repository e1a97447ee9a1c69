"""Pictures against the names of classes, by a plain loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made import batch, features, unit
from torch import Tensor

from declip.objectives.class_names import ClassNames, class_names_loss


def probabilities(rows: int, classes: int) -> Tensor:
    """Of some of the classes that there are: they do not sum to one."""
    return torch.randn(rows, classes + 2, generator=torch.Generator().manual_seed(3)).softmax(-1)[:, :classes]


def naive(images: Tensor, names: Tensor, scores: Tensor, scale: float, own: float, rows: list[int]) -> float:
    total = 0.0
    for view in images:
        for row in rows:
            partner = row + 1 if row % 2 == 0 else row - 1
            likely = torch.stack([scale * view[row] @ name for name in names]).double().softmax(0)
            for place in range(len(names)):
                wanted = own * scores[row, place]
                if own != 1:
                    wanted = wanted + (1 - own) * scores[partner, place]
                total -= float(wanted * likely[place].log())
    return total / len(rows) / len(images)


@pytest.mark.parametrize("own_share", [1.0, 0.7])
def test_like_naive(own_share: float) -> None:
    images, names, scores = unit(2, 6, 8), unit(4, 8, seed=1), probabilities(6, 4)
    found = class_names_loss(images, names, scores, torch.tensor(7.0), own_share)
    assert float(found) == pytest.approx(naive(images, names, scores, 7.0, own_share, list(range(6))), rel=1e-5)


def test_what_nobody_has_seen_takes_no_part() -> None:
    images, names, scores = unit(1, 6, 8).requires_grad_(), unit(4, 8, seed=1).requires_grad_(), probabilities(6, 4)
    scores[2] = float("nan")
    found = class_names_loss(images, names, scores, torch.tensor(7.0))
    assert float(found) == pytest.approx(naive(images.detach(), names, scores, 7.0, 1.0, [0, 1, 3, 4, 5]), rel=1e-5)
    found.backward()
    for given in (images, names):
        assert given.grad is not None
        assert given.grad.isfinite().all()
    mixed = class_names_loss(images, names, scores, torch.tensor(7.0), 0.7)  # its partner neither
    assert float(mixed) == pytest.approx(naive(images.detach(), names, scores, 7.0, 0.7, [0, 1, 4, 5]), rel=1e-5)
    assert float(class_names_loss(images, names, torch.full((6, 4), float("nan")), torch.tensor(7.0))) == 0


def test_the_term_takes_its_views() -> None:
    made = replace(features(images=2, batch=6), class_text=3 * unit(4, 8, seed=1))
    given = replace(batch(range(6)), class_scores=probabilities(6, 4), own_share=0.7)
    images, names = made.unit_image.detach(), unit(4, 8, seed=1)
    assert given.class_scores is not None
    for views in (1, 2):
        expected = naive(images[:views], names, given.class_scores, 7.0, 0.7, list(range(6)))
        assert float(ClassNames(views)(made, given)) == pytest.approx(expected, rel=1e-5)
