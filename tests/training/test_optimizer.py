"""Weight decay where it belongs, and the learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from declip.model.dual_encoder import DualEncoder
from declip.objectives.objective import build_objective
from declip.optimization import Optimizer
from declip.recipe import Recipe, parse_recipe
from declip.training.optimizer import build_optimizer, learning_rate, parameter_groups

MakeRecipe = Callable[..., Recipe]
EMBEDDINGS = {"clip.token_embedding.weight", "clip.positional_embedding", "clip.visual.positional_embedding"}


def names(recipe: Recipe) -> tuple[set[str], set[str]]:
    """The parameters with and without weight decay."""
    model = DualEncoder(recipe)
    objective = build_objective(recipe, model)
    name_of = {id(p): name for module in (model, objective) for name, p in module.named_parameters()}
    decayed, plain = parameter_groups([model, objective], recipe.optimizer)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (recipe.optimizer.weight_decay, 0.0)
    found = [{name_of[id(p)] for p in group["params"]} for group in (decayed, plain)]  # type: ignore[attr-defined]
    trainable = {name_of[id(p)] for m in (model, objective) for p in m.parameters() if p.requires_grad}
    assert found[0] | found[1] == trainable
    assert not found[0] & found[1]
    return found[0], found[1]


def test_matrices_decay_and_nothing_else(tiny: MakeRecipe) -> None:
    decayed, plain = names(tiny("declip"))
    assert EMBEDDINGS | {"clip.logit_scale", "mask_embedding", "clip.visual.class_embedding"} <= plain
    assert {"clip.visual.conv1.weight", "clip.text_projection", "clip.visual.proj"} <= decayed
    assert {"terms.simsiam.projector.linear1.weight", "terms.masked_language.head.weight"} <= decayed
    assert {"terms.simsiam.projector.bn1.weight", "terms.masked_language.head.bias"} <= plain
    assert not any("bias" in name or "ln_" in name or ".bn" in name for name in decayed)


def test_embeddings_decay_where_asked(tiny: MakeRecipe) -> None:
    """The reference's groups: all but norms, biases of layers and the logit scale."""
    decayed, plain = names(tiny("declip", "optimizer.decay_embeddings=true"))
    assert decayed >= EMBEDDINGS | {"mask_embedding", "clip.visual.class_embedding"}
    assert {name for name in decayed if "bias" in name} == {
        "clip.visual.transformer.resblocks.0.attn.in_proj_bias",
        "clip.transformer.resblocks.0.attn.in_proj_bias",
    }
    assert all(any(part in name for part in ("bias", "ln_", ".bn", "logit_scale")) for name in plain)


def test_embeddings_of_other_towers_do_not_decay(tiny: MakeRecipe) -> None:
    image = ["model.image.timm_model_name=vit_tiny_patch16_224", "model.image.image_size=224"]
    decayed, plain = names(tiny("clip", *image, "model.image.timm_pool=token"))
    assert {"clip.visual.trunk.pos_embed", "clip.visual.trunk.cls_token"} <= plain
    assert "clip.visual.trunk.blocks.0.attn.qkv.weight" in decayed


def test_frozen_parameters_are_left_out(tiny: MakeRecipe) -> None:
    decayed, plain = names(tiny("clip", "model.freeze_patch_embedding=true"))
    assert "clip.visual.conv1.weight" not in decayed | plain


def test_adamw_step() -> None:
    """The first step of AdamW: the rate against the gradient's sign, and the decay times the rate."""
    layer = torch.nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = build_optimizer([layer], Optimizer(lr=0.01, weight_decay=0.5))
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight, before["weight"] * (1 - 0.01 * 0.5) - 0.01)
    torch.testing.assert_close(layer.bias, before["bias"] - 0.01)


def rates(steps: int, **schedule: float) -> list[float]:
    recipe = parse_recipe({"optimizer": {"lr": 0.1}, "schedule": schedule})
    return [learning_rate(step, steps, recipe) for step in range(steps)]


def test_schedule_values() -> None:
    found = rates(10, warmup=0.2, final_lr=0.1)
    cosine = [0.1 * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 8)) / 2) for step in range(8)]
    assert found == pytest.approx([0.05, 0.1, *cosine])


def test_schedule_shape() -> None:
    found = rates(1000, warmup=0.1)
    assert found[:100] == pytest.approx([0.1 * (step + 1) / 100 for step in range(100)])
    assert all(later < earlier for earlier, later in pairwise(found[100:]))
    assert found[100] == 0.1
    assert found[550] == pytest.approx(0.05)
    assert 0 < found[-1] < 1e-6


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 0.9), (2, 0.5), (3, 0.99)])
def test_short_runs_learn_something(steps: int, warmup: float) -> None:
    found = rates(steps, warmup=warmup)
    assert min(found) > 0
    assert max(found) == pytest.approx(0.1)
