"""Every method trains: twenty steps on the embedded pairs with scaled-down towers, and the loss falls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_checks import TAUGHT
from stopping import stop_after

import declip
from declip.data.decoded import open_images
from declip.data.loader import BatchMaker
from declip.data.sources import open_sources
from declip.model.dual_encoder import DualEncoder
from declip.objectives.objective import build_objective
from declip.ranks import ALONE
from declip.recipe import Recipe, load_recipe
from declip.training.average import WeightAverage
from declip.training.logging import read_metrics
from declip.training.optimizer import build_optimizer, parameter_groups
from declip.training.step import Step

METHODS = ("clip", "slip", "filip", "declip", "defilip", "siglip", "cosmos", "best")
SMALLER = [
    *("data.train=demo:noto", "data.fraction=0.2", "data.workers=0", "data.cache_gb=0", "data.holdout=0"),
    *("schedule.batch_size=32", "schedule.pairs_seen=640", "engine.device=cpu", "engine.precision=float32"),
    *("model.image.image_size=64", "model.embed_dim=32", "model.text.layers=1", "model.text.width=32"),
    *("model.text.heads=1", "optimizer.lr=2e-3"),
]
HEADS = {
    "simclr": ["terms.simclr.width=64", "terms.simclr.dim=32"],
    "simsiam": ["terms.simsiam.width=64", "terms.simsiam.bottleneck=16"],
    "token_wise": ["terms.token_wise.dim=32"],
    "nearest_neighbour": ["terms.nearest_neighbour.queue_size=256"],
}


def smaller(method: str, *more: str) -> Recipe:
    terms = load_recipe(method).terms.active()
    heads = [override for name in terms for override in HEADS.get(name, [])]
    return load_recipe(method, [*SMALLER, "model.image.width=8", *heads, *more])


PRESETS = [(method, preset) for method in METHODS for preset in ("best", "paper", "reference")]
PRESETS = [pair for pair in PRESETS if pair[0] != "best" or pair[1] == "best"]  # that recipe has none


@pytest.mark.parametrize(("method", "preset"), [pair for pair in PRESETS if pair != ("siglip", "reference")])
def test_the_loss_falls(method: str, preset: str) -> None:
    recipe = smaller(method, *([] if preset == "best" else [f"method={preset}"]))
    before, after = losses_of(recipe)
    assert after < before


@pytest.mark.parametrize("method", METHODS)
def test_a_run_shows_every_term(method: str, tmp_path: Path) -> None:
    recipe = smaller(method, "schedule.pairs_seen=96")
    declip.train(recipe, tmp_path / "run", quiet=True)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert rows[-1]["step"] == 3
    assert {name for name in rows[0]["terms"] if "." not in name} == recipe.terms.active().keys()


def losses_of(recipe: Recipe) -> tuple[float, float]:
    """The loss on the first batches before and after twenty steps, without the queue, which is empty at first."""
    torch.manual_seed(0)
    model = DualEncoder(recipe)
    objective = build_objective(recipe, model, torch.arange(49408))
    source = open_sources(recipe.data.train, recipe.data)
    towers = model.image_size, model.context_length, model.tokenizer, model.full_captions
    maker = BatchMaker(open_images(source, 0, 1), recipe, *towers, local_size=model.local_size)
    optimizer, step = build_optimizer([model, objective], recipe.optimizer), Step(model, objective, "float32", ALONE)
    if recipe.terms.teacher_contrast:
        step.average = WeightAverage([*model.parameters(), *objective.parameters()], 0.9)
    first = whole_loss(step, maker)
    for number in range(20):
        loss, _ = step(maker.make(number))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.clamp_logit_scale()
        objective.clamp_logit_scale()
        if step.average is not None:
            step.average.update()
    return first, whole_loss(step, maker)


@torch.no_grad()
def whole_loss(step: Step, maker: BatchMaker) -> float:
    step.objective.eval()  # the queue is not filled
    _, terms = step(maker.make(0))
    step.objective.train()
    weights = step.objective.weights.items()
    return sum(weight * float(terms[name]) for name, weight in weights if name != "nearest_neighbour")


@pytest.mark.parametrize("method", ["slip", "filip", "defilip", "siglip", "cosmos"])
def test_a_run_of_each_method_resumes_exactly_and_opens(
    method: str, tiny: Callable[..., Recipe], tmp_path: Path
) -> None:
    terms = {
        "slip": ["terms.simclr.width=32", "terms.simclr.dim=16", "data.strong_images.flip=0.5"],
        "filip": ["terms.contrastive=none", "terms.token_wise.dim=8"],
        "defilip": ["terms.token_wise.dim=8", "terms.token_wise.mask_padding=false", "terms.token_wise.top_k=3"],
        "siglip": ["terms.contrastive=none", "terms.sigmoid.weight=1", "model.logit_bias_init=-10"],
        "cosmos": [*TAUGHT, "terms.teacher_contrast.cross_attention=true", "terms.teacher_contrast.local_images=1"],
    }[method]
    recipe = tiny("declip" if method == "defilip" else "clip", *terms)
    whole = declip.train(recipe, tmp_path / "whole", quiet=True)
    stop_after(recipe, tmp_path / "parts", 3)
    declip.train(recipe, tmp_path / "parts", resume=True, quiet=True)
    for name in ("open_clip_model.safetensors", "declip_heads.safetensors"):
        one, other = tmp_path / "whole" / name, tmp_path / "parts" / name
        assert one.is_file() == other.is_file()
        if one.is_file():
            assert one.read_bytes() == other.read_bytes(), name
    assert whole["held_out_score"] is not None
    model = declip.load(tmp_path / "whole")
    assert (model.token_wise is not None) == (method == "filip")
    assert (model.clip.logit_bias is not None) == (method == "siglip")
    assert model.encode_text(["a cat"]).shape == ((1, 77, 8) if method == "filip" else (1, 16))


def test_logit_scales_stay_in_their_ranges(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny("clip", "terms.token_wise.logit_scale_range=[0.5,2.0]", "model.logit_scale_range=[3.0,6.0]")
    model = DualEncoder(recipe)
    objective = build_objective(recipe, model)
    words = objective.terms["token_wise"]
    for value, kept in ((9.0, 2.0), (-3.0, 0.5), (1.0, 1.0)):
        words.logit_scale.data.fill_(value)
        objective.clamp_logit_scale()
        assert words.logit_scale.item() == kept


def test_capped_logit_scale(tiny: Callable[..., Recipe]) -> None:
    """The value stops at the cap, the gradient is that of the exponential (as in the public code)."""
    recipe = tiny("clip", "model.logit_scale_cap=100", "model.logit_scale_range=[3.0,6.0]")
    model = DualEncoder(recipe)
    source = open_sources(recipe.data.train, recipe.data)
    batch = BatchMaker(open_images(source, 1, 1), recipe, 16, 77).make(0)
    for value, scale in ((5.5, 100.0), (4.0, 54.598)):
        model.clip.logit_scale.data.fill_(value)
        model.clip.logit_scale.grad = None
        found = model(batch).logit_scale
        assert found.item() == pytest.approx(scale, rel=1e-4)
        found.backward()
        assert model.clip.logit_scale.grad.item() == pytest.approx(torch.tensor(value).exp().item(), rel=1e-5)


def test_views_apart_are_views_together_without_batch_norm(tiny: Callable[..., Recipe]) -> None:
    """A ViT gives the same; a ResNet's batch norm then sees one view at a time."""
    for image, same in (([], True), (["model.image.layers=[1,1,1,1]", "model.image.image_size=64"], False)):
        recipes = [tiny("declip", *image, f"model.views_apart={flag}") for flag in ("false", "true")]
        found = []
        for recipe in recipes:
            torch.manual_seed(0)
            model = DualEncoder(recipe)
            source = open_sources(recipe.data.train, recipe.data)
            batch = BatchMaker(open_images(source, 1, 1), recipe, model.image_size, 77).make(0)
            found.append(model(batch).image)
        assert torch.allclose(*found, rtol=1e-4, atol=1e-5) == same


def test_sgd_and_a_rate_of_its_own_for_the_logit_scale(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny("clip", "optimizer.kind=sgd", "optimizer.lr=0.2", "optimizer.logit_scale_lr=1e-4")
    model = DualEncoder(recipe)
    groups = parameter_groups([model], recipe.optimizer)
    peaks = {group["peak"] for group in groups}
    assert peaks == {0.2, 1e-4}
    (scale,) = next(group["params"] for group in groups if group["peak"] == 1e-4)  # type: ignore[misc]
    assert scale is model.clip.logit_scale
    assert isinstance(build_optimizer([model], recipe.optimizer), torch.optim.SGD)


def test_a_logit_scale_that_is_kept(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny("clip", "optimizer.kind=sgd", "optimizer.lr=0.01", "optimizer.logit_scale_lr=0")
    declip.train(recipe, tmp_path / "run", quiet=True)
    rows = [row for row in read_metrics(tmp_path / "run") if "logit_scale" in row]
    assert {row["logit_scale"] for row in rows} == {rows[0]["logit_scale"]}
