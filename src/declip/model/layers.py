"""A tower cut in two: lower layers that rest, and the last ones, which learn on what those give (tune = last).

What the lower layers give may be kept, and the last ones go on from there: no layer below is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from declip.errors import InputError
from declip.model.depth import layers_to_top
from declip.model.image_tower import EncodedImages, encode_image
from declip.model.parts import Part, part_of
from declip.model.text_tower import EncodedTexts, by_length, encode_text, is_huggingface, transformer_of
from declip.model.towers import Towers

_STAGES = (("layer1", "layer2", "layer3", "layer4"), ("s1", "s2", "s3", "s4"))  # of open_clip's and timm's ResNets


class _Reached(Exception):
    """Carries what arrives at the first layer that learns; nothing above it is wanted."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def blocks_of(clip: Towers, part: Part) -> list[nn.Module]:
    """The layers of a tower one after the other; raises InputError where it has no such list."""
    tower = clip.visual if part == "image" else clip.text if is_huggingface(clip) else transformer_of(clip)
    tower = getattr(tower, "trunk", tower)
    if hasattr(tower, "transformer") and hasattr(tower.transformer, "resblocks"):
        return list(tower.transformer.resblocks)
    for names in _STAGES:
        if all(hasattr(tower, name) for name in names):
            return [block for name in names for block in _flat(getattr(tower, name))]
    for name in ("blocks", "stages"):
        if hasattr(tower, name):
            return _flat(getattr(tower, name))
    lists = [list(module) for module in tower.modules() if isinstance(module, nn.ModuleList)]
    if part == "text" and any(lists):
        return max(lists, key=len)
    raise InputError(f"model.{part}.tune = last: it is not known which the layers of this tower are.")


def last_blocks(clip: Towers, part: Part, count: int) -> list[nn.Module]:
    """The last `count` layers; raises InputError where the tower has not more than these."""
    blocks = blocks_of(clip, part)
    if count >= len(blocks):
        raise InputError(
            f"model.{part}.tune_layers = {count}: this tower has {len(blocks)} layers, of which one at least has to "
            f"rest; set a lower number, or model.{part}.tune = all."
        )
    return blocks[-count:]


def names_of_last(clip: Towers, part: Part, count: int) -> set[str]:
    """The parameters, by name in `clip`, of the last `count` layers of a tower and of what follows them."""
    own = {id(parameter) for block in last_blocks(clip, part, count) for parameter in block.parameters()}
    below = layers_to_top(clip)
    names = {name: parameter for name, parameter in clip.named_parameters() if part_of(name) == part}
    deepest = max(below[name] for name, parameter in names.items() if id(parameter) in own)
    return {name for name in names if below[name] <= deepest}


def image_below(clip: Towers, count: int, pixels: Tensor) -> Tensor:
    """What arrives at the last `count` layers: a grid [batch, channels, height, width], or [batch, tokens, width]."""
    return _arriving(last_blocks(clip, "image", count)[0], lambda: encode_image(clip, pixels))


def image_above(clip: Towers, count: int, states: Tensor) -> EncodedImages:
    """What the tower makes of an image of which `image_below` is known."""
    size = clip.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    nothing = torch.zeros(1, 3, height, width, device=states.device)  # what is made of it is replaced
    with _skipped(blocks_of(clip, "image"), count, states):
        return encode_image(clip, nothing)


def text_below(clip: Towers, count: int, tokens: Tensor) -> Tensor:
    """What arrives at the last `count` layers of int64 [batch, tokens]: [batch, tokens, width]."""
    return _arriving(last_blocks(clip, "text", count)[0], lambda: encode_text(clip, tokens, whole=True))


def text_above(clip: Towers, count: int, tokens: Tensor, states: Tensor, whole: bool = False) -> EncodedTexts:
    """What the tower makes of captions of which `text_below` is known; `whole` as `encode_text`."""

    def encode(rows: Tensor | slice, length: int) -> EncodedTexts:
        with _skipped(blocks_of(clip, "text"), count, states[rows, :length]):
            return encode_text(clip, tokens[rows, :length], whole=True)

    return by_length(clip, tokens, encode, whole)


def _arriving(block: nn.Module, run: Callable[[], Any]) -> Tensor:
    def stop(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        raise _Reached(arguments[0])

    hook = block.register_forward_pre_hook(stop)
    try:
        run()
    except _Reached as reached:
        return reached.states
    finally:
        hook.remove()
    raise RuntimeError("the tower did not use this layer")


@contextmanager
def _skipped(blocks: list[nn.Module], count: int, states: Tensor) -> Iterator[None]:
    """Within, layers below the last `count` do nothing, and the first of these finds `states`."""
    hook = blocks[-count].register_forward_pre_hook(lambda _, arguments: (states, *arguments[1:]))
    for block in blocks[:-count]:
        block.forward = _unchanged  # hides the class's until it is taken away again
    try:
        yield
    finally:
        hook.remove()
        for block in blocks[:-count]:
            del block.forward


def _unchanged(states: Any, *_: Any, **__: Any) -> Any:
    return states


def _flat(module: nn.Module) -> list[nn.Module]:
    """Nested sequences as one."""
    if not isinstance(module, nn.Sequential | nn.ModuleList):
        return [module]
    return [block for part in module for block in _flat(part)]
