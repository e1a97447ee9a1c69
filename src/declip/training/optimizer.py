"""The optimizer with the right groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from declip.recipe import Optimizer, Recipe
from declip.training.sharding import own_part

EMBEDDINGS = (
    *("token_embedding", "positional_embedding", "class_embedding", "mask_embedding"),
    *("pos_embed", "cls_token", "reg_token"),  # timm's
)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
LOGIT_SCALES = ("logit_scale", "logit_bias")


def parameter_groups(modules: list[nn.Module], options: Optimizer) -> list[dict[str, Any]]:
    """Groups of trainable parameters, those with weight decay first.

    Matrices decay; biases, norms, scales and (unless asked) embeddings do not. With `decay_embeddings` the reference's
    groups: all decays but norms, biases of layers and logit scales, so attention's input biases do.
    The logit scale is a group of its own where it has its own learning rate. `peak` is each group's peak rate.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {
        (options.weight_decay, options.lr): [],
        (0.0, options.lr): [],
    }
    for module in modules:
        kept = _never_decayed(module) if options.decay_embeddings else _not_decayed(module)
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            scale = name.rsplit(".", 1)[-1] in LOGIT_SCALES
            rate = options.logit_scale_lr if scale and options.logit_scale_lr is not None else options.lr
            decay = 0.0 if scale or name in kept else options.weight_decay
            groups.setdefault((decay, rate), []).append(parameter)
    return [{"params": group, "weight_decay": decay, "peak": rate} for (decay, rate), group in groups.items()]


def _not_decayed(module: nn.Module) -> set[str]:
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    named = module.named_parameters()
    return {
        name
        for name, parameter in named
        if parameter.ndim < 2 or id(parameter) in tables or any(part in name for part in EMBEDDINGS)
    }


def _never_decayed(module: nn.Module) -> set[str]:
    kept = set()
    for prefix, part in module.named_modules():
        for name, _ in part.named_parameters(recurse=False):
            if isinstance(part, NORMS) or (name == "bias" and isinstance(part, nn.Linear | nn.Conv2d)):
                kept.add(f"{prefix}.{name}".removeprefix("."))
    return kept


def build_optimizer(modules: list[nn.Module], options: Optimizer) -> torch.optim.Optimizer:
    """Fused AdamW or Nesterov SGD over the trainable parameters of the modules, of sharded ones this rank's parts."""
    groups = parameter_groups(modules, options)
    for group in groups:
        group["params"] = [own_part(parameter) for parameter in group["params"]]
    if options.kind == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Rate of step 0 … steps - 1: a linear rise over the warm-up, then half a cosine down to final_lr × peak.

    With `start_lr` the rise goes from there at the first step to the peak at the last of the warm-up, and the cosine
    ends at the last step, exactly as in the reference; without it the rise takes equal steps from zero.
    """
    schedule, peak = recipe.schedule, recipe.optimizer.lr
    warmup, start = max(1, round(schedule.warmup * steps)), schedule.start_lr
    if step < warmup:
        if start is None or warmup == 1:
            return peak * (step + 1) / warmup
        return peak * (start + (1 - start) * step / (warmup - 1))
    progress = (step - warmup + (start is not None)) / max(1, steps - warmup)
    floor = schedule.final_lr
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
