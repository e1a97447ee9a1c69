"""Which tower a tensor of both belongs to, and whether it is a projection, by its name."""

from __future__ import annotations

import re
from typing import Literal

Part = Literal["image", "text"]

_PROJECTION = re.compile(r"(proj$|head\.|attnpool\.c_proj\.|text_projection|proj\.)")


def part_of(name: str) -> Part | None:
    """The tower that a parameter or module of the two towers belongs to, by its name; None of a logit scale or bias."""
    if name.startswith("logit_"):
        return None
    return "image" if name == "visual" or name.startswith("visual.") else "text"


def is_projection(name: str) -> bool:
    """Whether a tensor of the two towers, by its name, brings a pooled feature to the joint space."""
    return _PROJECTION.match(name.removeprefix("visual.").removeprefix("text.")) is not None
