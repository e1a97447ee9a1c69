"""Runs that learn from a moving average of their own weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import maker
from rank_checks import RESNET, TAUGHT
from safetensors.torch import load_file
from stopping import stop_after
from torch.nn import functional as F

from declip.data.loader import BatchMaker
from declip.errors import InputError
from declip.model.dual_encoder import DualEncoder
from declip.model.image_tower import encode_image, resized_positions
from declip.objectives.objective import build_objective
from declip.ranks import ALONE
from declip.recipe import Recipe
from declip.training.average import WeightAverage
from declip.training.checkpoint import checkpoints
from declip.training.flops import pair_flops
from declip.training.locked import kept_parts
from declip.training.logging import read_metrics
from declip.training.loop import train
from declip.training.step import Step

MakeRecipe = Callable[..., Recipe]


def test_the_step_asks_the_average(tiny: MakeRecipe) -> None:
    """What the average makes of views is what a model with its weights makes; batch norms stay as they were."""
    recipe = tiny("clip", *TAUGHT, *RESNET)
    torch.manual_seed(0)
    model = DualEncoder(recipe)
    objective = build_objective(recipe, model)
    step = Step(model, objective, "float32", ALONE)
    step.average = WeightAverage([*model.parameters(), *objective.parameters()], 0.9)
    for tensor in step.average.average:
        tensor.mul_(1.3)
    other = copy.deepcopy(model)
    for parameter, tensor in zip(other.parameters(), step.average.average, strict=False):
        parameter.data.copy_(tensor)
    towers = model.view_size, model.context_length
    batch = BatchMaker(maker(recipe).images, recipe, *towers).make(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = step._by_average(batch, step.average)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with torch.no_grad():
        expected = other(batch.part(2, ["joined", "single"]))
    torch.testing.assert_close(found["teacher_image"], F.normalize(expected.image, dim=-1))
    texts = torch.stack([expected.text["joined"], expected.text["single"]])
    torch.testing.assert_close(found["teacher_text"], F.normalize(texts, dim=-1))
    loss, terms = step(batch)
    loss.backward()
    assert {"teacher_contrast", "teacher_contrast.image_to_image", "teacher_contrast.text_to_text"} <= terms.keys()
    assert all(parameter.grad is not None for parameter in model.clip.visual.parameters())


@pytest.mark.parametrize("more", [[], ["optimizer.ema_update=before", "terms.teacher_contrast.cross_attention=true"]])
def test_a_stopped_run_ends_like_one_that_was_not(tiny: MakeRecipe, tmp_path: Path, more: list[str]) -> None:
    recipe, runs = tiny("clip", *TAUGHT, *more), [tmp_path / "whole", tmp_path / "stopped"]
    train(recipe, runs[0], quiet=True)
    stop_after(recipe, runs[1], 3)
    train(recipe, runs[1], resume=True, quiet=True)
    finished = [load_file(run / "open_clip_model.safetensors") for run in runs]
    for name, tensor in finished[0].items():
        torch.testing.assert_close(tensor, finished[1][name])
    scores = [[row["held_out"] for row in read_metrics(run) if "held_out" in row] for run in runs]
    assert scores[0] == scores[1]
    ends = [torch.load(checkpoints(run)[0], weights_only=True) for run in runs]
    for one, other in zip(ends[0]["average"]["average"], ends[1]["average"]["average"], strict=True):
        torch.testing.assert_close(one, other)


def test_scores_of_the_weights_stand_beside_those_of_their_average(tiny: MakeRecipe, tmp_path: Path) -> None:
    train(tiny("clip", "optimizer.ema_half_life=2", "evaluation.unaveraged=true"), tmp_path / "run", quiet=True)
    train(tiny("clip"), tmp_path / "plain", quiet=True)
    rows = [row["held_out"] for row in read_metrics(tmp_path / "run") if "held_out" in row]
    plain = [row["held_out"] for row in read_metrics(tmp_path / "plain") if "held_out" in row]
    assert [row["unaveraged_score"] for row in rows] == [row["score"] for row in plain]
    assert [row["score"] for row in rows] != [row["unaveraged_score"] for row in rows]


def test_a_half_life_is_one(tiny: MakeRecipe) -> None:
    optimizer = tiny("clip", "optimizer.ema_half_life=0.05").optimizer
    assert optimizer.averages
    assert optimizer.ema_decay(1000) ** 50 == pytest.approx(0.5)
    assert optimizer.ema_decay(10) == 0.5  # not less than a step
    assert tiny("clip", "optimizer.ema=0.9").optimizer.ema_decay(1000) == 0.9
    assert not tiny("clip").optimizer.averages


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optimizer.ema=0.9", "optimizer.ema_half_life=0.1"], "ema and ema_half_life say the decay of one average"),
        (
            ["terms.teacher_contrast.weight=1"],
            "learns from a moving average of the weights: set optimizer.ema_half_life",
        ),
        (["evaluation.unaveraged=true"], "evaluation.unaveraged is beside optimizer.ema_half_life"),
        ([*TAUGHT, "terms.teacher_contrast.weights=[0,0,0,0]"], "one above it at least"),
        ([*TAUGHT, "terms.teacher_contrast.own_view=false", "terms.teacher_contrast.images=1"], "set images = 2"),
        (
            [*TAUGHT, "terms.teacher_contrast.cross_attention=true", "terms.token_wise.dim=8"],
            "teacher_contrast.cross_attention and terms.token_wise want other tokens: leave one out",
        ),
        ([*TAUGHT, "terms.teacher_contrast.local_images=2", "data.augment_on=device"], "are made by data.augment_on"),
        (["data.local_images.convolve=0.5"], "small crops are not convolved"),
        ([*TAUGHT, "data.mix=0.2"], "data.mix does not go with terms.teacher_contrast"),
    ],
)
def test_what_does_not_go_together(tiny: MakeRecipe, overrides: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        tiny("clip", *overrides)


def test_small_crops_are_the_terms_alone(tiny: MakeRecipe) -> None:
    """The other views are what they are without them, and the embedding of a crop is that of the tower on it."""
    crops = ["terms.teacher_contrast.local_images=3", "data.local_images.crop_scale=[0.05,0.1]"]
    recipe, plain = tiny("clip", *TAUGHT, *crops), tiny("clip", *TAUGHT)
    torch.manual_seed(0)
    model = DualEncoder(recipe)
    assert model.local_size == 8  # one patch of the two that a side has
    images = maker(recipe).images
    batch = BatchMaker(images, recipe, 16, 77, local_size=8).make(0)
    assert batch.local_images is not None
    assert batch.local_images.shape == (3, 8, 8, 8, 3)
    assert torch.equal(batch.images, BatchMaker(images, plain, 16, 77).make(0).images)
    found = model(batch)
    expected = encode_image(model.clip, model.pixels(batch.local_images[1]), any_size=True).embedding
    torch.testing.assert_close(found.local_image[1], expected)
    assert model(BatchMaker(images, plain, 16, 77).make(0)).local_image is None
    assert pair_flops(recipe, 10) > 1.2 * pair_flops(plain, 10)


def test_what_the_average_makes_counts_as_compute(tiny: MakeRecipe) -> None:
    without = pair_flops(tiny("clip", *TAUGHT, "terms.teacher_contrast=none", "terms.contrastive.images=2"), 10)
    taught = pair_flops(
        tiny("clip", *TAUGHT, "terms.contrastive.images=2", "terms.teacher_contrast.texts=['single']"), 10
    )
    assert taught / without == pytest.approx(4 / 3, rel=0.15)  # a forward pass more; backward is two of them


@pytest.mark.parametrize("wanted", [(2, 3), (7, 7), (4, 4)])
def test_positions_for_another_grid(wanted: tuple[int, int]) -> None:
    """A linear ramp stays one, however many places it is read at; the first row is as it was."""
    grid = np.stack(np.meshgrid(np.arange(5.0), np.arange(5.0), indexing="ij"), axis=-1).reshape(25, 2)
    positions = torch.from_numpy(np.concatenate([[[9.0, 9.0]], grid])).float()
    found = resized_positions(positions, (5, 5), wanted)
    assert found.shape == (1 + wanted[0] * wanted[1], 2)
    assert torch.equal(found[0], positions[0])
    rows = found[1:].unflatten(0, wanted)
    assert torch.allclose(rows[..., 0], rows[:, :1, 0].expand(*wanted), atol=1e-5)
    assert bool((rows[1:, 0, 0] > rows[:-1, 0, 0]).all())


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        ([], ["image"]),
        (["terms.teacher_contrast.local_images=2"], []),
        (["terms.teacher_contrast.cross_attention=true"], []),
        (["data.second_images.grayscale=1.0"], []),
        (["data.images.convolve=0.5"], []),
    ],
)
def test_what_is_kept_of_resting_towers_are_views_of_one_kind(
    tiny: MakeRecipe, more: list[str], kept: list[str]
) -> None:
    """Small crops, other second views, convolved ones and tokens go through the tower at each step."""
    assert kept_parts(tiny("clip", *TAUGHT, "model.image.tune=projection", *more)) == kept


def test_a_second_view_of_its_own(tiny: MakeRecipe) -> None:
    two = ["terms.contrastive.images=2", "data.images.crop_scale=[1.0,1.0]"]
    other = ["data.second_images.grayscale=1.0", "data.second_images.crop_scale=[0.2,0.4]"]
    plain, mixed = (maker(tiny("clip", *two, *more)).make(0).images for more in ([], other))
    assert torch.equal(plain[0], mixed[0])
    assert not torch.equal(plain[1], mixed[1])
    grey: Any = mixed[1].float()
    assert float((grey - grey.mean(dim=-1, keepdim=True)).abs().max()) <= 1
