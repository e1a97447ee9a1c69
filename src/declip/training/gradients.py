"""Gradients between the backward pass and the optimizer: averaged, measured, scaled back, clipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from declip.ranks import Ranks
from declip.training.sharding import Part, take_gradients

# Those of torch.amp.GradScaler.
START, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000


class LossScale:
    """What the loss is multiplied with so that small gradients do not vanish in float16 (Micikevicius et al., 2018,
    arXiv 1710.03740, §3.2).

    It is halved in each step whose gradients overflow, which is then skipped, and doubled after 2000 steps without.
    torch.amp.GradScaler does the same, but looks at each gradient; here their norm, the same on all ranks, tells.
    Nobody waits for the device.

    moves: false: it stays 1, for other precisions
    """

    def __init__(self, device: torch.device, moves: bool) -> None:
        self.moves = moves
        self.value = torch.full((), START if moves else 1.0, device=device)
        self.fitting = torch.zeros((), dtype=torch.int32, device=device)  # steps since it last changed

    def update(self, overflow: Tensor) -> None:
        """overflow: bool, scalar: whether the step's gradients were not finite"""
        if not self.moves:
            return
        fitting = torch.where(overflow, 0, self.fitting + 1)
        grows = fitting == INTERVAL
        factor = torch.where(overflow, BACKOFF, torch.where(grows, GROWTH, 1.0))
        self.value, self.fitting = self.value * factor, fitting.masked_fill(grows, 0)

    def state(self) -> dict[str, Tensor]:
        return {"value": self.value, "fitting": self.fitting}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.value, self.fitting = (state[name].to(self.value.device) for name in ("value", "fitting"))


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], limit: float, ranks: Ranks, scale: LossScale) -> Tensor:
    """Divide the gradients by the loss scale and clip them to a norm of `limit`, as torch's clip_grad_norm_ does.

    Of a sharded model's the small ones, which are not sharded, are first averaged over the ranks.
    Returns the norm of all before they were clipped, the same on all ranks; not finite where one of them is not.
    """
    shards = take_gradients([p for p in parameters if isinstance(p, Part)])
    others = [p.grad for p in parameters if p.grad is not None and not isinstance(p, Part)]
    if shards:
        _average(others, ranks)
        squares = ranks.sum(_norm(shards).square()) + _norm(others).square()
        norm = squares.sqrt() / scale.value
    else:
        norm = _norm(others) / scale.value
    torch._foreach_mul_([*shards, *others], (limit / (norm + 1e-6)).clamp(max=1) / scale.value)
    return norm


def _norm(gradients: list[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm


def _average(gradients: list[Tensor], ranks: Ranks) -> None:
    """In place, in one sum."""
    means = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients])) / ranks.count
    parts = torch.split(means, [gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(own) for part, own in zip(parts, gradients, strict=True)])
