"""Stochastic depth and dropout: what is left out, how often, and that evaluation knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rank_checks import RESNET

from declip.errors import InputError
from declip.model.dual_encoder import DualEncoder
from declip.model.image_tower import encode_image
from declip.recipe import Recipe

MakeRecipe = Callable[..., Recipe]
VIT = ["model.image.layers=3", "model.text.layers=3"]


def towers(recipe: Recipe) -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(recipe)


@pytest.mark.parametrize("what", ["drop_path", "dropout"])
@pytest.mark.parametrize("options", [VIT, RESNET])
def test_evaluation_is_as_without_it(tiny: MakeRecipe, options: list[str], what: str) -> None:
    plain, dropping = towers(tiny("clip", *options)), towers(tiny("clip", *options, f"model.image.{what}=0.5"))
    pixels = torch.randn(4, 3, plain.image_size, plain.image_size)
    found = [encode_image(model.eval().clip, pixels).embedding for model in (plain, dropping)]
    torch.testing.assert_close(*found)


def test_the_mean_is_that_of_evaluation(tiny: MakeRecipe) -> None:
    """Of one branch: kept in three of four rows, and then a third larger."""
    model = towers(tiny("clip", "model.image.drop_path=0.25")).train()
    block = model.clip.visual.transformer.resblocks[0]
    branch = torch.ones(40_000, 1, 1)
    left = block.ls_1(branch)
    assert sorted(set(left.flatten().tolist())) == pytest.approx([0, 4 / 3])
    assert left.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(block.eval().ls_1(branch), branch)


@pytest.mark.parametrize("part", ["image", "text"])
def test_dropout_leaves_numbers_out(tiny: MakeRecipe, part: str) -> None:
    """Of every branch one number in four, and the others are a third larger."""
    model = towers(tiny("clip", f"model.{part}.dropout=0.25")).train()
    tower = model.clip.visual.transformer if part == "image" else model.clip.transformer
    for block in tower.resblocks:
        for branch in (block.ls_1, block.ls_2):
            left = branch(torch.ones(10, 40, 100))
            assert sorted(set(left.flatten().tolist())) == pytest.approx([0, 4 / 3])
            assert left.mean().item() == pytest.approx(1, abs=0.02)
            assert (left == 0).any(dim=2).all()  # no row as a whole


def test_later_blocks_are_left_out_more_often(tiny: MakeRecipe) -> None:
    model = towers(tiny("clip", *VIT, "model.text.drop_path=0.6")).train()
    shares = []
    for block in model.clip.transformer.resblocks:
        shares.append((block.ls_2(torch.ones(20_000, 1, 1)) == 0).float().mean().item())
    assert shares == [pytest.approx(share, abs=0.02) for share in (0.2, 0.4, 0.6)]


def test_rows_are_left_out_one_by_one_and_the_rest_of_the_block_stays(tiny: MakeRecipe) -> None:
    """A branch that is left out leaves the row as it came in."""
    model = towers(tiny("clip", "model.image.drop_path=0.5")).train()
    block = model.clip.visual.transformer.resblocks[0]
    rows = torch.randn(64, 5, 32)
    out = block(rows)
    same = (out == rows).flatten(1).all(dim=1)
    assert 5 < int(same.sum()) < 30  # a quarter, where both branches were left out


@pytest.mark.parametrize(("what", "instead"), [("drop_path", "timm_drop_path"), ("dropout", "timm_drop")])
def test_a_tower_without_blocks_says_so(tiny: MakeRecipe, what: str, instead: str) -> None:
    with pytest.raises(InputError, match=rf"model.image.{what}: only open_clip's own .* model.image.{instead}"):
        towers(tiny("clip", f"model.image.{what}=0.1", "model.image.timm_model_name=resnet10t"))
