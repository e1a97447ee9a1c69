"""AdamW with the right groups, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from declip.recipe import Optimizer, Recipe

EMBEDDINGS = ("token_embedding", "positional_embedding", "class_embedding", "mask_embedding")


def parameter_groups(modules: list[nn.Module], options: Optimizer) -> list[dict[str, object]]:
    """Two groups: matrices with weight decay; biases, norms, scales and (unless asked) embeddings without."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            embedding = any(part in name for part in EMBEDDINGS)
            vector = parameter.ndim < 2
            keep = vector or (embedding and not options.decay_embeddings)
            (plain if keep else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]


def build_optimizer(modules: list[nn.Module], options: Optimizer) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters of the modules."""
    groups = parameter_groups(modules, options)
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Rate of step 0 … steps - 1: a linear rise over the warm-up, then half a cosine down to final_lr × peak."""
    peak, warmup = recipe.optimizer.lr, max(1, round(recipe.schedule.warmup * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    floor = recipe.schedule.final_lr
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
