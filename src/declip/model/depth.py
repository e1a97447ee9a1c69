"""How deep in its tower a parameter sits, for learning rates that fall with the distance from the top."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from declip.errors import InputError
from declip.model.text_tower import is_huggingface
from declip.model.towers import Towers

# What stands before the blocks of open_clip's own towers; the rest that is in no block stands after them.
STEMS = ("conv", "bn", "class_embedding", "positional_embedding", "token_embedding", "ln_pre")


def layers_to_top(clip: Towers) -> dict[str, int]:
    """For every parameter of both towers, by its name in `clip`: how many layers it is below the top of its tower.

    The top, 0, is what follows the blocks: last norm, pooling, projection. The last block is 1, and so on down to what
    comes before the first block, as in BEiT (arXiv 2106.08254) and timm. A ResNet's stages count as blocks, of a timm
    tower what timm calls a layer.
    Raises InputError where a timm or Hugging Face tower does not say which its layers are.
    """
    image = {f"visual.{name}": below for name, below in _of_image_tower(clip.visual).items()}
    if is_huggingface(clip):
        text = {f"text.{name}": below for name, below in _of_huggingface(clip.text).items()}
    else:
        own = [name for name, _ in clip.named_parameters() if not name.startswith(("visual.", "logit_"))]
        text = _by_blocks(own, r"(?:text\.)?transformer\.resblocks\.(\d+)\.")
    return image | text


def _of_image_tower(tower: nn.Module) -> dict[str, int]:
    from open_clip.timm_model import TimmModel

    if isinstance(tower, TimmModel):
        return _of_timm(tower)
    names = [name for name, _ in tower.named_parameters()]
    return _by_blocks(names, r"transformer\.resblocks\.(\d+)\.|layer(\d)\.")


def _by_blocks(names: list[str], pattern: str) -> dict[str, int]:
    """pattern: what a block's parameters start with, and its number"""
    found = {name: re.match(pattern, name) for name in names}
    numbers = {name: int(match[match.lastindex or 0]) for name, match in found.items() if match}
    first, last = min(numbers.values()), max(numbers.values())
    stem = {name for name in names if name.removeprefix("text.").startswith(STEMS)}
    return {
        name: last + 1 - numbers[name] if name in numbers else last + 2 - first if name in stem else 0 for name in names
    }


def _of_timm(tower: Any) -> dict[str, int]:
    from timm.models import group_parameters

    if not hasattr(tower.trunk, "group_matcher"):
        raise InputError(
            "optimizer.layer_decay: timm does not say which the layers of this image tower are; set it to 1."
        )
    places = group_parameters(tower.trunk, tower.trunk.group_matcher(coarse=False), reverse=True)
    head = [name for name, _ in tower.head.named_parameters()]
    top = max(places.values()) + bool(head)  # without a head, timm's own classifier is the projection
    below = {f"trunk.{name}": top - place for name, place in places.items()}
    return below | {f"head.{name}": 0 for name in head}


def _of_huggingface(tower: nn.Module) -> dict[str, int]:
    """The longest list of modules are the blocks; what is registered before them comes before them."""
    lists = {name: part for name, part in tower.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    if not lists:
        raise InputError("optimizer.layer_decay: this text tower has no list of layers; set it to 1.")
    blocks = max(lists, key=lambda name: len(lists[name]))
    below: dict[str, int] = {}
    reached = len(lists[blocks]) + 1
    for name, _ in tower.named_parameters():
        if name.startswith(f"{blocks}."):
            reached = len(lists[blocks]) - int(name.removeprefix(f"{blocks}.").split(".")[0])
            below[name] = reached
        else:
            below[name] = reached if reached > len(lists[blocks]) else 0
    return below
