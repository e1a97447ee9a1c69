"""Memory for time: what the backward pass needs is not kept but computed again, a piece or a block at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from declip.errors import InputError
from declip.model.text_tower import is_huggingface, transformer_of
from declip.model.towers import Towers

BatchNorm = nn.modules.batchnorm._BatchNorm


def recomputed(module: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, of which only the inputs are kept; the backward pass computes it again.

    With the same random numbers, so that dropout drops the same; batch norms of `module` note their statistics once.
    """

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), noting_nothing(module)

    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def noting_nothing(module: nn.Module) -> Iterator[None]:
    """Within, batch norms of `module` use a batch's statistics and leave their own as they are."""
    norms = [part for part in module.modules() if isinstance(part, BatchNorm)]
    before = [
        (norm.momentum, None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone())
        for norm in norms
    ]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, BatchNorm) for part in module.modules())


def recompute_blocks(clip: Towers) -> None:
    """Let both towers keep the inputs of their blocks alone while they train (activation checkpointing).

    Raises InputError where a tower cannot.
    """
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel

    tower = clip.visual
    if isinstance(tower, ModifiedResNet):
        for layer in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
            for block in layer:
                block.forward = functools.partial(recomputed, block, block.forward)
    elif isinstance(tower, TimmModel) and has_batch_norm(tower):
        raise InputError(
            "engine.grad_checkpointing: the batch norm of this timm tower would count each batch twice: leave it out."
        )
    else:
        tower.set_grad_checkpointing(True)
    if is_huggingface(clip):
        clip.text.transformer.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        transformer_of(clip).transformer.grad_checkpointing = True
