"""Stochastic depth and dropout: in training, branches of a tower's blocks, or numbers of them, are left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.errors import InputError
from declip.model.parts import Part

_BRANCHES = {"Bottleneck": ("bn3",), "ResidualAttentionBlock": ("ls_1", "ls_2")}
"""By block of open_clip's: the modules whose output is added to what came in."""


def add_drop_path(tower: nn.Module, part: Part, rate: float) -> None:
    """Leave the branches of the last block out with probability `rate`, those before it less, the first one's hardly.

    What is left in is divided by the probability that it is, so that its mean is that of evaluation, in which nothing
    is left out (Huang et al. 2016, arXiv:1603.09382; the line over the depth is theirs too).
    Raises InputError where the tower has no such blocks.
    """
    blocks = _blocks(tower, part, "drop_path")
    for number, block in enumerate(blocks, start=1):
        for name in _BRANCHES[type(block).__name__]:
            getattr(block, name).register_forward_hook(_leave_out(rate * number / len(blocks)))


def add_dropout(tower: nn.Module, part: Part, rate: float) -> None:
    """Set numbers of every branch to zero with probability `rate`, before it is added (Vaswani et al. 2017, §5.4).

    Raises InputError where the tower has no such blocks.
    """
    for block in _blocks(tower, part, "dropout"):
        for name in _BRANCHES[type(block).__name__]:
            getattr(block, name).register_forward_hook(
                lambda module, _, branch: F.dropout(branch, rate) if module.training else None
            )


def _blocks(tower: nn.Module, part: Part, asked: str) -> list[Any]:
    blocks: list[Any] = [module for module in tower.modules() if type(module).__name__ in _BRANCHES]
    if not blocks:
        instead = "timm_drop_path" if asked == "drop_path" else "timm_drop"
        raise InputError(
            f"model.{part}.{asked}: only open_clip's own transformers and ResNets leave blocks out so; for timm's "
            f"networks say model.image.{instead}."
        )
    return blocks


def _leave_out(rate: float) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    def hook(module: nn.Module, _: Any, branch: Tensor) -> Tensor | None:
        if not module.training:
            return None
        kept = torch.rand(len(branch), device=branch.device) >= rate
        return branch * (kept / (1 - rate)).to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))

    return hook
