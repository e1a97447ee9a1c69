"""What of the towers learns: all, low-rank changes (LoRA), biases (BitFit), the projection alone, or nothing (LiT)."""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from declip.errors import InputError
from declip.model.towers import Towers
from declip.recipe import Tune

Part = Literal["image", "text"]

LOCKED = ("projection", "nothing")
"""Ways to tune in which what a tower pools stays the same."""

PROJECTION = re.compile(r"(proj$|head\.|attnpool\.c_proj\.|text_projection|proj\.)")
"""Names, within a tower, of what brings a pooled feature to the joint space."""


def tower_of(clip: Towers, part: Part) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a tower by their names within it."""
    found = []
    for name, parameter in clip.named_parameters():
        if name.startswith("visual."):
            own: Part = "image"
        elif name.startswith("logit_"):
            continue
        else:
            own = "text"
        if own == part:
            found.append((name.removeprefix("visual.").removeprefix("text."), parameter))
    return found


def choose_parameters(clip: Towers, part: Part, tune: Tune) -> None:
    """Let the parameters of a tower learn that `tune` says; raises InputError where it has no projection to learn."""
    if tune == "all":
        return
    learning = 0
    for name, parameter in tower_of(clip, part):
        is_projection = PROJECTION.match(name) is not None
        learns = tune != "nothing" and (is_projection or (tune == "biases" and name.endswith("bias")))
        parameter.requires_grad_(learns)
        learning += is_projection
    if tune == "projection" and not learning:
        raise InputError(f"model.{part}.tune = projection: this tower has no projection of its own.")


def rest(clip: Towers, part: Part) -> None:
    """Dropout and batch norms of a tower that does not learn as a whole behave as in a finished model."""
    for name, module in clip.named_children():
        if (name == "visual") == (part == "image"):
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
        within = name.removeprefix("visual.").removeprefix("text.")
        if name.startswith("visual.") != (part == "image") or PROJECTION.match(f"{within}."):
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
