"""What of the towers learns: all, biases (BitFit), the projection into the joint space, or nothing (LiT)."""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

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
