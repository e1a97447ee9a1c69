"""Weight decay where it belongs, and the learning rate over a run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import declip
from declip.errors import InputError
from declip.model.dual_encoder import DualEncoder
from declip.objectives.objective import build_objective
from declip.optimization import Optimizer
from declip.recipe import Recipe, load_recipe, parse_recipe, shipped
from declip.training.muon import Muon, is_matrix, orthogonal
from declip.training.optimizer import (
    batch_factor,
    build_optimizer,
    check_schedule,
    cooldown_start,
    learning_rate,
    parameter_groups,
    same_rates,
)
from declip.training.run import Run

MakeRecipe = Callable[..., Recipe]
RESNET = ("model.image.layers=[1,1,1,1]", "model.image.width=8", "model.image.image_size=32")
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


def test_muon_step(tiny: MakeRecipe) -> None:
    """Matrices and kernels move by nearly orthogonal ones, of AdamW's size; all else by Adam's steps."""
    recipe = tiny("declip", "optimizer.kind=muon", "optimizer.weight_decay=0", *RESNET)
    model = DualEncoder(recipe)
    objective = build_objective(recipe, model)
    named = {name: p for module in (model, objective) for name, p in module.named_parameters()}
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = build_optimizer([model, objective], recipe.optimizer)
    torch.manual_seed(0)
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    moved = {name: (before[name] - p.detach()) / recipe.optimizer.lr for name, p in named.items()}
    whole = ("clip.text_projection", "clip.visual.layer1.0.conv2.weight", "terms.simsiam.projector.linear1.weight")
    pool = model.clip.visual.attnpool
    heads = {"clip.transformer.resblocks.0.attn.in_proj_weight": 3 * recipe.model.text.heads}
    heads |= {f"clip.visual.attnpool.{part}_proj.weight": pool.num_heads for part in "qkv"}
    steps = [(name, moved[name].flatten(1)) for name in whole]
    steps += [(name, step) for name, count in heads.items() for step in moved[name].chunk(count)]
    for name, step in steps:
        sizes = torch.linalg.svdvals(step) / (0.2 * max(step.shape) ** 0.5)
        assert 0.5 < sizes.min() < sizes.max() < 1.4, name
    plain = {"clip.visual.bn1.bias", "clip.token_embedding.weight", "terms.masked_language.head.weight"}
    for name in plain:
        expected = named[name].grad.sign()  # type: ignore[union-attr]
        torch.testing.assert_close(moved[name], expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 8, 40), (1, 40, 8)])
def test_orthogonal_as_timm(shape: tuple[int, ...]) -> None:
    """The iterations on X·Xᵀ are those on X."""
    from timm.optim.muon import _COEFFICIENTS, zeropower_via_newtonschulz

    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.logspace(0, -3, shape[-1])
    expected = zeropower_via_newtonschulz(matrices, 5, _COEFFICIENTS["quintic"], dtype=torch.float64)
    torch.testing.assert_close(orthogonal(matrices).double(), expected, rtol=0, atol=1e-3)


def test_muon_as_timm() -> None:
    """Five steps of matrices and kernels, with decay, beside timm's in bfloat16; all else beside AdamW."""
    from timm.optim.muon import Muon as TimmMuon

    torch.manual_seed(0)
    own = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(16, 8), torch.nn.Conv2d(8, 8, 3, groups=8))
    own[0].to(memory_format=torch.channels_last)
    peer, plain = copy.deepcopy(own), copy.deepcopy(own)
    start = copy.deepcopy(own)
    options = {"lr": 0.01, "weight_decay": 0.5, "betas": (0.9, 0.98)}
    optimizers = [
        Muon([{"params": own.parameters()}], **options),
        TimmMuon(peer.parameters(), nesterov=True, **options),
        torch.optim.AdamW(plain.parameters(), **options),
    ]
    for _ in range(5):
        for parameters in zip(own.parameters(), peer.parameters(), plain.parameters(), strict=True):
            gradient = torch.randn(parameters[0].shape)
            for parameter in parameters:
                parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in own.named_parameters():
        expected = dict((peer if is_matrix(parameter) else plain).named_parameters())[name]
        moved = expected - dict(start.named_parameters())[name]
        torch.testing.assert_close(parameter, expected, rtol=0, atol=0.02 * moved.abs().max().item())
    assert [name for name, parameter in own.named_parameters() if is_matrix(parameter)] == ["0.weight", "1.weight"]


# Rates of their own


def groups_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The group of every trainable parameter."""
    model = DualEncoder(recipe)
    objective = build_objective(recipe, model)
    name_of = {id(p): name for module in (model, objective) for name, p in module.named_parameters()}
    groups = parameter_groups([model, objective], recipe.optimizer)
    keys = [(group["weight_decay"], group["peak"], group["use_fallback"], group["begins"]) for group in groups]
    assert len(set(keys)) == len(keys)  # as few groups as can be
    return {name_of[id(p)]: group for group in groups for p in group["params"]}


def rate_of(recipe: Recipe) -> dict[str, float]:
    """The peak rate of every trainable parameter."""
    return {name: group["peak"] for name, group in groups_of(recipe).items()}


def test_a_rate_for_each_part(tiny: MakeRecipe) -> None:
    options = [f"optimizer.{part}_lr={rate}" for part, rate in (("image", 1.0), ("text", 2.0), ("head", 3.0))]
    found = rate_of(tiny("declip", *options, "optimizer.logit_scale_lr=4", "terms.token_wise.dim=8"))
    expected = {
        name: 4.0
        if name.endswith("logit_scale")
        else 1.0
        if name.startswith("clip.visual.")
        else 2.0
        if name.startswith("clip.")
        else 3.0
        for name in found
    }
    assert found == expected
    assert {name.split(".")[0] for name, rate in found.items() if rate == 3} == {"terms", "mask_embedding"}
    assert {name for name, rate in found.items() if rate == 4} == {
        *("clip.logit_scale", "terms.token_wise.logit_scale"),
    }
    assert set(rate_of(tiny("declip", "optimizer.text_lr=0.1")).values()) == {1e-3, 0.1}


def test_rates_that_fall_with_the_depth(tiny: MakeRecipe) -> None:
    """Factor 0.5 a layer, on each tower's own rate; heads and logit scale keep theirs."""
    recipe = tiny("declip", "optimizer.layer_decay=0.5", "optimizer.text_lr=0.1", "model.image.layers=3")
    found = rate_of(recipe)
    expected = {
        **{"clip.visual.proj": 1e-3, "clip.visual.transformer.resblocks.2.mlp.c_fc.weight": 5e-4},
        **{"clip.visual.transformer.resblocks.0.ln_1.bias": 1.25e-4, "clip.visual.conv1.weight": 6.25e-5},
        **{
            "clip.ln_final.bias": 0.1,
            "clip.transformer.resblocks.0.ln_1.bias": 0.05,
            "clip.token_embedding.weight": 0.025,
        },
        **{"clip.logit_scale": 1e-3, "mask_embedding": 1e-3, "terms.masked_language.head.weight": 1e-3},
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_groups_move_at_their_rates(tiny: MakeRecipe) -> None:
    """The first step of AdamW moves each weight by its own rate, as the loop sets it: rate of the step × peak / lr."""
    recipe = tiny("clip", "optimizer.layer_decay=0.5", "optimizer.image_lr=0", "optimizer.weight_decay=0")
    model = DualEncoder(recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer([model], recipe.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 3e-4 * group["peak"] / recipe.optimizer.lr
    optimizer.step()
    depths = {"clip.visual.conv1.weight": None, "clip.ln_final.bias": 0, "clip.token_embedding.weight": 2}
    for name, depth in depths.items():
        step = 0.0 if depth is None else 3e-4 * 0.5**depth
        torch.testing.assert_close(before[name] - model.get_parameter(name), torch.full_like(before[name], step))


def test_layers_begin_to_learn_from_the_top_down(tiny: MakeRecipe, tmp_path: Path) -> None:
    """Of 8 steps the first 6 see one layer more every third: stem, block and top of both towers."""
    recipe = tiny("clip", "optimizer.unfreeze=0.75", "optimizer.lr=0.01", "evaluation.every=1.0")
    begins = {name: group["begins"] for name, group in groups_of(recipe).items()}
    assert begins["clip.visual.proj"] == begins["clip.ln_final.weight"] == begins["clip.logit_scale"] == 0
    assert begins["clip.visual.transformer.resblocks.0.ln_1.weight"] == pytest.approx(0.375)
    assert begins["clip.token_embedding.weight"] == begins["clip.visual.conv1.weight"] == pytest.approx(0.75)
    torch.manual_seed(recipe.seed)
    before = DualEncoder(recipe).clip.state_dict()
    moved: dict[str, int] = {}

    def noted(self: Run) -> None:
        for name, tensor in self.model.clip.state_dict().items():
            if name not in moved and not torch.equal(tensor, before[name]):
                moved[name] = self.step
        end_step(self)

    end_step = Run.end_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "end_step", noted)
        declip.train(recipe, tmp_path / "run", quiet=True)
    assert moved["visual.proj"] == moved["ln_final.weight"] == 0
    assert moved["visual.transformer.resblocks.0.ln_1.weight"] == 3
    assert moved["token_embedding.weight"] == moved["visual.conv1.weight"] == 6


def test_projections_have_a_rate_of_their_own(tiny: MakeRecipe) -> None:
    for image, projections in (((), {"clip.visual.proj"}), (RESNET, {"clip.visual.attnpool.c_proj.weight"})):
        asked = ["optimizer.projection_lr=0.5", "optimizer.text_lr=0.1", "optimizer.layer_decay=0.5"]
        found = rate_of(tiny("clip", *image, *asked))
        high = {name for name, rate in found.items() if rate == pytest.approx(0.5)}
        assert high - {"clip.visual.attnpool.c_proj.bias"} == projections | {"clip.text_projection"}
        assert found["clip.ln_final.weight"] == pytest.approx(0.1)


def test_a_rate_for_heads_that_are_not_there(tiny: MakeRecipe) -> None:
    with pytest.raises(InputError, match=r"optimizer\.head_lr: none of the recipe's terms has a head that learns"):
        rate_of(tiny("clip", "optimizer.head_lr=0.1"))


# The rate beside the batch


def scaled(batch: int, lr_batch: int, kind: str = "adamw") -> float:
    options = {"lr_batch": lr_batch, "kind": kind}
    return batch_factor(parse_recipe({"optimizer": options, "schedule": {"batch_size": batch}}))


def test_rates_go_with_the_batch_up_to_the_one_they_are_meant_for() -> None:
    assert scaled(4096, 0) == scaled(48, 48) == scaled(32768, 48) == 1
    assert (scaled(32, 128), scaled(32, 128, "sgd")) == (0.5, 0.25)
    assert scaled(64, 4096) == 0.125


def test_the_loop_learns_at_the_scaled_rate() -> None:
    values = {"optimizer": {"lr": 0.1, "lr_batch": 128}, "schedule": {"batch_size": 32, "warmup": 0.1}}
    recipe = parse_recipe(values)
    assert max(learning_rate(step, 100, recipe) for step in range(100)) == 0.05


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_at_their_own_batch(name: str) -> None:
    """Rates are as written there, and lower with few pairs; those of the paper and the public code never are."""
    recipe = load_recipe(name)
    assert batch_factor(recipe) == 1
    other = "schedule.batch_size=32"
    if recipe.method == "best":
        assert batch_factor(load_recipe(name, [other])) < 1
    if recipe.model.image.init is not None or name.startswith("best"):  # of no paper
        return
    if recipe.method == "best":
        assert batch_factor(load_recipe(name, [other, "method=paper"])) == 1
    if not name.startswith("siglip") and recipe.method == "best":
        recipe = load_recipe(name, [other, "method=reference"])
    if recipe.method == "reference":
        assert recipe.optimizer.lr_batch == 0


# The rate over a run


def rates(steps: int, **schedule: float | str) -> list[float]:
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


def test_constant_with_a_cooldown() -> None:
    found = rates(20, shape="constant", warmup=0.1, cooldown=0.25, final_lr=0.2)
    falling = [0.1 * (0.2 + 0.8 * (1 - math.sqrt(step / 5))) for step in range(5)]
    assert found == pytest.approx([0.05, *[0.1] * 14, *falling])
    assert rates(20, shape="constant", warmup=0.1) == rates(20, shape="constant", warmup=0.1, cooldown=0.2)
    assert rates(20, shape="constant", warmup=0.1, cooldown=0) == pytest.approx([0.05, *[0.1] * 19])
    assert rates(20, shape="constant", start_lr=0.5, warmup=0.1)[-1] == 0  # exactly, as with the reference's cosine
    assert min(rates(3, shape="constant", warmup=0, cooldown=1)) > 0


def recipe_of(**schedule: float | str) -> Recipe:
    return parse_recipe({"optimizer": {"lr": 0.1}, "schedule": {"batch_size": 8, **schedule}})


def test_a_longer_run_begins_alike() -> None:
    """With the warm-up in pairs, every rate before the cool-down is the same, bit by bit."""
    recipe = recipe_of(shape="constant", warmup_pairs=40)
    short, long = (50, recipe), (500, recipe)
    assert (cooldown_start(*short), cooldown_start(*long)) == (40, 400)
    assert [learning_rate(step, *short) for step in range(5)] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert same_rates(41, short, long)  # the cool-down's first step still has the full rate
    assert not same_rates(42, short, long)
    share = recipe_of(shape="constant", warmup=0.1)
    assert not same_rates(1, (50, share), (500, share))
    assert same_rates(40, (50, share), (500, recipe_of(shape="constant", warmup_pairs=40)))
    cosine = recipe_of(warmup_pairs=40)
    assert same_rates(6, (50, cosine), (500, cosine))
    assert not same_rates(7, (50, cosine), (500, cosine))
    assert cooldown_start(50, cosine) == 50


def test_no_time_after_the_warmup() -> None:
    check_schedule(1, recipe_of(warmup_pairs=1))
    check_schedule(50, recipe_of(shape="constant", warmup_pairs=320))
    for shape, left in (("constant", 40), ("cosine", 50)):
        with pytest.raises(
            InputError, match=f"warmup_pairs = 800 are 100 steps, and a run of 50 steps has {left} before"
        ):
            check_schedule(50, recipe_of(shape=shape, warmup_pairs=800))


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ({"cooldown": 0.1}, "^recipe: schedule: a cosine has no cooldown: leave it out, or set shape = constant"),
        ({"shape": "constant", "cooldown": 0, "final_lr": 0.1}, "without a cooldown the learning rate never falls to"),
        ({"shape": "constant", "warmup": 0.9}, "warmup and cooldown are more than the whole run together"),
        ({"shape": "linear"}, r"schedule\.shape = 'linear' is wrong: input should be 'cosine' or 'constant'"),
    ],
)
def test_schedules_that_cannot_be(schedule: dict[str, float | str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        recipe_of(**schedule)
