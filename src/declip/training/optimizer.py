"""The optimizer with the right groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from declip.errors import InputError
from declip.model.depth import layers_to_top
from declip.model.dual_encoder import DualEncoder
from declip.model.parts import is_projection
from declip.model.towers import NORMS
from declip.optimization import Optimizer
from declip.recipe import Recipe
from declip.training.muon import Muon, attention_heads
from declip.training.sharding import own_part

EMBEDDINGS = (
    *("token_embedding", "positional_embedding", "class_embedding", "mask_embedding"),
    *("pos_embed", "cls_token", "reg_token"),  # timm's
)
TOWERS = ("image", "text")
LOGIT_SCALES = ("logit_scale", "logit_bias")
VOCABULARY = "masked_language.head"  # a row for every word, as in an embedding


def parameter_groups(modules: list[nn.Module], options: Optimizer) -> list[dict[str, Any]]:
    """Groups of trainable parameters, one for each weight decay and peak rate.

    Matrices decay; biases, norms, scales and (unless asked) embeddings do not. With `decay_embeddings` the reference's
    groups: all decays but norms, biases of layers and logit scales, so attention's input biases do.
    Each has its part's peak rate (image tower, text tower, projections, heads, logit scale), times `layer_decay` for
    each layer between it and the top of its tower. `peak` is the group's peak rate at a batch of `lr_batch`. For Muon
    `use_fallback` says what Adam takes: embeddings, the vocabulary's head, and whatever is no matrix. `begins`: after
    which share of the steps the group learns.
    Raises InputError where there are no heads for head_lr, or a tower does not say which its layers are.
    """
    groups: dict[tuple[float, float, bool, float], list[nn.Parameter]] = {
        (options.weight_decay, options.lr, False, 0.0): [],
        (0.0, options.lr, False, 0.0): [],
    }
    found = set()
    for module in modules:
        vectors = _not_decayed(module)
        kept = _never_decayed(module) if options.decay_embeddings else vectors
        below = _layers_to_top(module) if options.layer_decay < 1 or options.unfreeze else {}
        depth = {part: max((n for name, n in below.items() if _part(name) == part), default=0) for part in TOWERS}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            part = _part(name)
            found.add(part)
            own: float | None = getattr(options, f"{part}_lr")
            if options.projection_lr is not None and part in TOWERS and is_projection(name.removeprefix("clip.")):
                own = options.projection_lr
            rate = (options.lr if own is None else own) * options.layer_decay ** below.get(name, 0)
            decay = 0.0 if part == "logit_scale" or name in kept else options.weight_decay
            fallback = options.kind == "muon" and (name in vectors or VOCABULARY in name)
            begins = options.unfreeze * below.get(name, 0) / max(1, depth.get(part, 0))
            groups.setdefault((decay, rate, fallback, begins), []).append(parameter)
    if options.head_lr is not None and "head" not in found:
        raise InputError("optimizer.head_lr: none of the recipe's terms has a head that learns; leave it out.")
    filled = {key: group for key, group in groups.items() if group}
    return [
        {"params": group, "weight_decay": decay, "peak": rate, "use_fallback": fallback, "begins": begins}
        for (decay, rate, fallback, begins), group in filled.items()
    ]


def _part(name: str) -> Literal["image", "text", "head", "logit_scale"]:
    """What a parameter belongs to, by its name in a DualEncoder or an Objective."""
    if name.rsplit(".", 1)[-1] in LOGIT_SCALES:
        return "logit_scale"
    if not name.startswith("clip."):
        return "head"
    return "image" if name.startswith("clip.visual.") else "text"


def _layers_to_top(module: nn.Module) -> dict[str, int]:
    if not isinstance(module, DualEncoder):
        return {}
    return {f"clip.{name}": below for name, below in layers_to_top(module.clip).items()}


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
    """AdamW, Nesterov SGD or Muon over the modules' trainable parameters; of sharded ones this rank's parts."""
    groups = parameter_groups(modules, options)
    for group in groups:
        group["params"] = [own_part(parameter) for parameter in group["params"]]
    if options.kind == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=True, fused=True)
    if options.kind == "muon":
        heads = {weight: count for module in modules for weight, count in attention_heads(module).items()}
        return Muon(groups, lr=options.lr, betas=options.betas, eps=options.eps, heads=heads)
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)


def batch_factor(recipe: Recipe) -> float:
    """What all rates are multiplied with because a step has fewer pairs than lr_batch, which they are meant for.

    The root of the batches' ratio for AdamW, the ratio itself for SGD, so that the noise of an epoch's steps stays the
    same (Malladi et al., 2022, arXiv 2205.10287; Goyal et al., 2017, arXiv 1706.02677). With more pairs rates stay, for
    what limits them then is not the noise (McCandlish et al., 2018, arXiv 1812.06162).
    """
    options = recipe.optimizer
    ratio = min(1.0, recipe.schedule.batch_size / options.lr_batch) if options.lr_batch else 1.0
    return ratio if options.kind == "sgd" else math.sqrt(ratio)


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Rate of step 0 … steps - 1: a linear rise over the warm-up, then down to final_lr × peak.

    Down goes half a cosine or, with shape = constant, after a constant rate a cool-down as 1 - sqrt, the shape that
    Hägele et al., 2024 (arXiv 2405.18392) found best. The peak is lr times `batch_factor`.
    With `start_lr` the rise goes from there at the first step to the peak at the last of the warm-up, and the way down
    ends at the last step, exactly as in the reference; without it the rise takes equal steps from zero.
    """
    schedule, peak = recipe.schedule, recipe.optimizer.lr * batch_factor(recipe)
    warmup, start = warmup_steps(steps, recipe), schedule.start_lr
    if step < warmup:
        if start is None or warmup == 1:
            return peak * (step + 1) / warmup
        return peak * (start + (1 - start) * step / (warmup - 1))
    down = warmup if schedule.shape == "cosine" else cooldown_start(steps, recipe)
    if step < down:
        return peak
    progress = (step - down + (start is not None)) / max(1, steps - down)
    left = (1 + math.cos(math.pi * progress)) / 2 if schedule.shape == "cosine" else 1 - math.sqrt(progress)
    floor = schedule.final_lr
    return peak * (floor + (1 - floor) * left)


def warmup_steps(steps: int, recipe: Recipe) -> int:
    """Steps of the warm-up, at least one."""
    schedule = recipe.schedule
    if schedule.warmup_pairs is None:
        return max(1, round(schedule.warmup * steps))
    return max(1, round(schedule.warmup_pairs / schedule.batch_size))


def cooldown_start(steps: int, recipe: Recipe) -> int:
    """The first step of the cool-down; `steps` where there is none. A run can be prolonged from there."""
    return max(min(steps, warmup_steps(steps, recipe)), steps - round(recipe.schedule.cooldown_share * steps))


def check_schedule(steps: int, recipe: Recipe) -> None:
    """Raises InputError where the warm-up leaves no time for the rest of a run of so many steps."""
    warmup, left = warmup_steps(steps, recipe), steps - round(recipe.schedule.cooldown_share * steps)
    if recipe.schedule.warmup_pairs is not None and 1 < warmup > left:
        raise InputError(
            f"schedule.warmup_pairs = {recipe.schedule.warmup_pairs} are {warmup} steps, and a run of {steps} steps "
            f"has {left} before its cool-down: lower it, or train for longer."
        )


def same_rates(step: int, one: tuple[int, Recipe], other: tuple[int, Recipe]) -> bool:
    """Whether all steps before `step` have the same learning rate in two runs, each given as (steps, recipe)."""
    return all(learning_rate(earlier, *one) == learning_rate(earlier, *other) for earlier in range(step))
