"""What of the towers learns: all, the last layers, little in each layer, the projection alone, or nothing (LiT).

Little in each layer: low-rank changes of its matrices (LoRA), or its biases (BitFit).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from declip.architecture import Tune
from declip.errors import InputError
from declip.model.layers import names_of_last
from declip.model.parts import Part, is_projection, part_of
from declip.model.recompute import BatchNorm
from declip.model.towers import Towers

LOCKED = ("projection", "nothing")
"""Ways to tune in which what a tower pools stays the same."""
RESTING = (*LOCKED, "last")
"""Ways to tune in which something below all that learns stays the same."""


def choose_parameters(clip: Towers, part: Part, tune: Tune, layers: int) -> None:
    """Let the parameters of a tower learn that `tune` says; layers: with tune = last, how many of them.

    Raises InputError where it has no projection to learn, or not so many layers.
    """
    if tune == "all":
        return
    own = [(name, parameter) for name, parameter in clip.named_parameters() if part_of(name) == part]
    if tune == "last":
        last = names_of_last(clip, part, layers)
        for name, parameter in own:
            parameter.requires_grad_(parameter.requires_grad and name in last)
        return
    for name, parameter in own:
        learns = tune != "nothing" and (is_projection(name) or (tune == "biases" and name.endswith("bias")))
        parameter.requires_grad_(learns)
    if tune == "projection" and not any(is_projection(name) for name, _ in own):
        raise InputError(f"model.{part}.tune = projection: this tower has no projection of its own.")


def rest(clip: Towers, part: Part) -> None:
    """Dropout and batch norms of a tower that does not learn as a whole behave as in a finished model."""
    for name, module in clip.named_children():
        if part_of(name) == part:
            module.eval()


def rest_batch_norms(clip: Towers) -> None:
    """Batch norms of both towers take the statistics that they have, and keep them; called in training mode."""
    for module in clip.modules():
        if isinstance(module, BatchNorm):
            module.eval()


class LowRank(nn.Module):
    """A weight ``[out, …]`` plus twice the product of two thin matrices, which is zero at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        width = weight[0].numel()
        self.down = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.up = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 2 * (self.up @ self.down).view_as(weight)


def add_adapters(clip: Towers, part: Part, rank: int) -> None:
    """Low-rank changes of a tower's matrices and plain convolutions, which alone then learn with its projection.

    LoRA (Hu et al. 2021, arXiv 2106.09685). Not by peft, whose change of ``nn.MultiheadAttention``'s last matrix has no
    effect (0.21). `plain_state` has the changes in the weights.
    """
    for name, module in list(clip.named_modules()):
        if part_of(name) != part or is_projection(f"{name}."):
            continue
        if isinstance(module, nn.MultiheadAttention):
            register_parametrization(module, "in_proj_weight", LowRank(module.in_proj_weight, rank))
        elif isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            register_parametrization(module, "weight", LowRank(module.weight, rank))


def plain_state(clip: Towers) -> dict[str, Tensor]:
    """The towers' tensors under their own names, low-rank changes added to the weights."""
    state: dict[str, Tensor] = clip.state_dict()
    for name, module in clip.named_modules():
        if is_parametrized(module):
            for tensor in module.parametrizations:
                state[f"{name}.{tensor}"] = getattr(module, tensor).detach()
    return {name: tensor for name, tensor in state.items() if ".parametrizations." not in name}
