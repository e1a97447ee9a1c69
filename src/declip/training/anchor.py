"""Weights held near those they started from (L2-SP), so that what was known is not forgotten."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Anchor:
    """Decay towards the weights at the start instead of zero (Li et al. 2018, arXiv 1802.01483).

    Decoupled from the gradient as AdamW's: after each step w <- w - rate * strength * (w - start). Holds a copy of the
    weights at the start.
    """

    def __init__(self, module: nn.Module, start: dict[str, Tensor], strength: float) -> None:
        self.strength = strength
        self.start = {
            id(parameter): start[name].to(parameter)
            for name, parameter in module.named_parameters()
            if name in start and parameter.requires_grad
        }

    @torch.no_grad()
    def pull(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step, with the rates that it was taken at."""
        for group in optimizer.param_groups:
            held = [parameter for parameter in group["params"] if id(parameter) in self.start]
            if held and group["lr"]:
                torch._foreach_lerp_(held, [self.start[id(one)] for one in held], group["lr"] * self.strength)
