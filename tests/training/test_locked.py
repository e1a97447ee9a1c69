"""Towers that are locked, wholly or in part: what learns, what is kept of them, and that steps are the same with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_one_broken
from safetensors.torch import load_file
from stopping import stop_after

import declip
from declip.data.loader import BatchMaker
from declip.errors import InputError
from declip.model.dual_encoder import DualEncoder
from declip.model.image_tower import encode_image
from declip.model.text_tower import EncodedTexts
from declip.recipe import Recipe
from declip.training import locked, loop
from declip.training.loop import batch_maker, set_up

pytestmark = pytest.mark.usefixtures("cache")

MakeRecipe = Callable[..., Recipe]
RESNET = "model.image={ image_size = 32, layers = [1, 1, 1, 1], width = 8, head_width = 32 }"
HEADS = ["model.image.tune=projection", "model.text.tune=projection"]
LAST = ["model.image.tune=last", "model.image.tune_layers=1", "model.text.tune=last", "model.text.tune_layers=1"]
TIMM = "model.image={ timm_model_name = 'mnasnet_small', timm_proj = 'linear', image_size = 32 }"
VIT = "model.image={ timm_model_name = 'vit_tiny_patch16_224', timm_proj = 'linear', image_size = 32 }"
TWO_LAYERS = ["model.text.layers=2"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "open_clip_model.safetensors")


def changed(recipe: Recipe, run: Path) -> set[str]:
    """Names of the tensors that a run changed."""
    torch.manual_seed(recipe.seed)
    before = DualEncoder(recipe).clip.state_dict()
    after = weights(run)
    return {name for name, tensor in after.items() if not torch.equal(before[name], tensor)}


@pytest.mark.parametrize("image", [[], [RESNET]])
def test_what_learns(image: list[str], tiny: MakeRecipe, tmp_path: Path) -> None:
    lr = "optimizer.lr=0.01"
    projections = (
        {"text_projection", "visual.attnpool.c_proj.weight", "visual.attnpool.c_proj.bias"}
        if image
        else {
            "text_projection",
            "visual.proj",
        }
    )
    recipe = tiny("clip", *image, lr, *HEADS)
    declip.train(recipe, tmp_path / "heads", quiet=True)
    assert changed(recipe, tmp_path / "heads") - {"logit_scale"} == projections

    recipe = tiny("clip", *image, lr, "model.image.tune=nothing")
    declip.train(recipe, tmp_path / "lit", quiet=True)
    found = changed(recipe, tmp_path / "lit")
    assert not [name for name in found if name.startswith("visual.")]
    assert {"token_embedding.weight", "text_projection"} <= found

    recipe = tiny("clip", *image, lr, "model.image.tune=biases", "model.text.tune=biases")
    declip.train(recipe, tmp_path / "biases", quiet=True)
    found = changed(recipe, tmp_path / "biases") - {"logit_scale"}
    assert projections < found
    assert all(name.endswith("bias") for name in found - projections)
    assert any("transformer.resblocks" in name for name in found)


@pytest.mark.parametrize("image", [[], [RESNET]])
def test_kept_features_are_the_towers(image: list[str], tiny: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny("clip", *image, *HEADS, "model.image.views_kept=3")
    run = set_up(recipe, tmp_path / "run", False, loop.Ranks())
    model, images = run.model.eval(), run.images
    assert run.kept.images is not None
    assert run.kept.texts is not None
    assert run.kept.images.shape == (32, 3, model.pooled_width)
    assert run.kept.texts.shape == (64, 8)
    drawn = images.views(5, model.image_size, [recipe.data.images] * 3, np.random.default_rng([recipe.seed, 5, 2]))
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in drawn]))
    with torch.no_grad():
        pooled = encode_image(model.clip, model.pixels(pixels)).pooled
    torch.testing.assert_close(torch.from_numpy(run.kept.images[5]).float(), pooled, rtol=1e-2, atol=1e-2)
    # A batch of kept features gives what the same views and captions give.
    kept = batch_maker(run).make(0)
    plain = BatchMaker(images, recipe, model.image_size, model.context_length, model.tokenizer).make(0)
    assert torch.equal(kept.sample_ids, plain.sample_ids)
    with torch.no_grad():
        ours, theirs = model(kept), model(plain)
    torch.testing.assert_close(ours.text["caption"], theirs.text["caption"], rtol=1e-2, atol=1e-2)
    for row, index in enumerate(kept.sample_ids.tolist()):
        assert any(np.array_equal(kept.kept_images[0, row], view) for view in run.kept.images[index])  # type: ignore[index]


@pytest.mark.parametrize("image", [[], [RESNET]])
def test_low_rank_changes_end_in_the_weights(image: list[str], tiny: MakeRecipe, tmp_path: Path) -> None:
    """A run of LoRA ends as a plain model that embeds as the towers with their adapters do, and can be resumed."""
    lora = ["model.image.tune=lora", "model.text.tune=lora", "model.text.lora_rank=2", "optimizer.lr=0.01"]
    recipe = tiny("clip", *image, *lora, "evaluation.every=1.0")
    summary = declip.train(recipe, tmp_path / "run", quiet=True)
    found = changed(recipe, tmp_path / "run") - {"logit_scale"}
    assert {
        "text_projection",
        "transformer.resblocks.0.attn.in_proj_weight",
        "transformer.resblocks.0.mlp.c_fc.weight",
    } <= found
    assert not [name for name in found if "ln_" in name or "embedding" in name or "bn" in name]
    torch.manual_seed(recipe.seed)
    before = DualEncoder(recipe).clip.state_dict()
    change = (
        weights(tmp_path / "run")["transformer.resblocks.0.mlp.c_fc.weight"]
        - before["transformer.resblocks.0.mlp.c_fc.weight"]
    )
    assert int(torch.linalg.matrix_rank(change, rtol=1e-3)) == 2
    run = set_up(recipe, tmp_path / "run", True, loop.Ranks())
    assert run.held_out is not None
    adapted = run.held_out.score(run.model, torch.device("cpu"))
    plain = DualEncoder(recipe)
    plain.clip.load_state_dict(weights(tmp_path / "run"))
    assert run.held_out.score(plain, torch.device("cpu")) == adapted
    assert summary["held_out_score"] == round(adapted["score"], 2)


def test_two_views_of_an_image_are_different_ones(tiny: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny("declip", "model.image.tune=nothing", "model.image.views_kept=2")
    run = set_up(recipe, tmp_path / "run", False, loop.Ranks())
    assert run.kept.texts is None  # masked and augmented captions have to be looked at anew
    batch = batch_maker(run).make(0)
    assert batch.kept_images is not None
    assert (batch.kept_images[0] != batch.kept_images[1]).any(-1).all()
    declip.train(recipe, tmp_path / "whole", quiet=True)


def test_what_terms_see_otherwise_is_not_kept(tiny: MakeRecipe, tmp_path: Path) -> None:
    """Tokens, and views of a second kind: a locked tower then looks at each view anew."""
    tokens = tiny("clip", *HEADS, "terms.token_wise={ dim = 8 }", "schedule.pairs_seen=16")
    assert locked.kept_parts(tokens) == []
    declip.train(tokens, tmp_path / "tokens", quiet=True)
    simsiam = ["terms.simsiam={ width = 32, bottleneck = 16 }", "data.strong_images={ blur = 1.0 }"]
    strong = tiny("clip", *HEADS, *simsiam, "schedule.pairs_seen=16")
    assert locked.kept_parts(strong) == ["text"]
    declip.train(strong, tmp_path / "strong", quiet=True)


def test_what_is_kept_is_used_again_and_made_anew_where_it_does_not_fit(
    tiny: MakeRecipe,
    tmp_path: Path,
    pairs: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made: list[str] = []
    for name in ("_write_images", "_write_texts"):
        write = getattr(locked, name)
        monkeypatch.setattr(locked, name, lambda *args, name=name, write=write: (made.append(name), write(*args)))
    declip.train(tiny("clip", *HEADS), tmp_path / "one", quiet=True)
    assert made == ["_write_images", "_write_texts"]
    declip.train(tiny("clip", *HEADS, "optimizer.lr=0.02"), tmp_path / "two", quiet=True)
    assert len(made) == 2
    assert "made anew" not in capsys.readouterr().err
    declip.train(tiny("clip", *HEADS, "model.image.views_kept=2"), tmp_path / "three", quiet=True)
    assert made[2:] == ["_write_images"]
    assert "was made by another image tower, of other views, or of pairs that have changed" in capsys.readouterr().err
    table = pq.read_table(pairs)
    captions = table["captions"].to_pylist()
    captions[3] = ["something else"]
    at = table.schema.get_field_index("captions")
    import pyarrow as pa

    pq.write_table(table.set_column(at, "captions", pa.array(captions)), pairs)
    declip.train(tiny("clip", *HEADS, "model.image.views_kept=2"), tmp_path / "four", quiet=True)
    assert made[3:] == ["_write_images", "_write_texts"]
    declip.train(tiny("clip", *HEADS, "model.image.views_kept=2", "seed=1"), tmp_path / "five", quiet=True)
    assert made[5:] == ["_write_images", "_write_texts"]  # the random towers are others


def test_a_run_goes_on_as_if_it_had_not_stopped(tiny: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny("clip", *HEADS)
    declip.train(recipe, tmp_path / "whole", quiet=True)
    stopped = tmp_path / "stopped"
    stop_after(recipe, stopped, 4)
    declip.train(recipe, stopped, resume=True, quiet=True)
    last = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in (tmp_path / "whole", stopped)]
    assert last[0]["held_out"] == last[1]["held_out"]


@pytest.mark.parametrize("last", [False, True])
def test_held_out_scores_are_those_of_the_whole_towers(last: bool, tiny: MakeRecipe, tmp_path: Path) -> None:
    options = ["model.image.layers=2", *TWO_LAYERS, *LAST] if last else HEADS
    run = set_up(tiny("clip", *options), tmp_path / "run", False, loop.Ranks())
    assert run.held_out is not None
    device = torch.device("cpu")
    found = run.held_out.score(run.model, device)
    assert run.held_out.below.keys() == {"image", "text"}
    run.model.tune = {"image": "all", "text": "all"}
    assert run.held_out.score(run.model, device) == found


def test_a_broken_image_is_stood_in_for(tiny: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_one_broken(tmp_path / "pairs.parquet")
    recipe = tiny("clip", *HEADS, "data.holdout=0", "data.broken_limit=0.1", "schedule.pairs_seen=40")
    summary = declip.train(recipe, tmp_path / "run", quiet=True)
    assert summary["broken"] == 1
    assert "skipped" in capsys.readouterr().err


def test_numbers_that_half_precision_does_not_hold(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = DualEncoder.images_below
    monkeypatch.setattr(DualEncoder, "images_below", lambda *args: encode(*args) * 1e7)
    with pytest.raises(InputError, match=r"too large to be kept in half precision: set model\.image\.views_kept=0"):
        declip.train(tiny("clip", *HEADS), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_pooling_that_learns_is_fed_with_grids(tiny: MakeRecipe, tmp_path: Path) -> None:
    tower = "model.image={ timm_model_name = 'resnet10t', timm_pool = 'rot_attn', timm_proj = '', image_size = 64 }"
    recipe = tiny("clip", tower, *HEADS, "model.image.views_kept=2", "optimizer.lr=0.01")
    run = set_up(recipe, tmp_path / "run", False, loop.Ranks())
    assert run.kept.images is not None
    assert run.kept.images.shape == (32, 2, 2, 2, 512)
    batch = batch_maker(run).make(0)
    assert batch.kept_images is not None
    assert batch.kept_images.shape == (1, 8, 2, 2, 512)
    declip.train(recipe, tmp_path / "whole", quiet=True)
    found = changed(recipe, tmp_path / "whole")
    assert any(name.startswith("visual.head.pool") for name in found)
    assert not any(name.startswith("visual.trunk") for name in found)
    assert locked.empty_features(run.model, run.images, recipe).images.shape == run.kept.images.shape  # type: ignore[union-attr]


def test_a_tower_without_a_projection(tiny: MakeRecipe, tmp_path: Path) -> None:
    timm = "model.image={ timm_model_name = 'mobilenetv3_small_050', timm_proj = '', image_size = 32 }"
    with pytest.raises(InputError, match=r"model\.image\.tune = projection: this tower has no projection"):
        declip.train(tiny("clip", timm, "model.image.tune=projection"), tmp_path / "run", quiet=True)
    declip.train(tiny("clip", timm, "model.image.tune=nothing", "schedule.pairs_seen=16"), tmp_path / "lit", quiet=True)


BOTH_WAYS = ["model.custom_text=true", "model.text.no_causal_mask=true", "model.text.pool_type=last"]


@pytest.mark.parametrize("text", [[], BOTH_WAYS])
@pytest.mark.parametrize("image", [["model.image.layers=2"], [RESNET], [TIMM], [VIT], [TIMM, "data.view_size=64"]])
def test_the_last_layers_go_on_from_what_is_kept(
    image: list[str], text: list[str], tiny: MakeRecipe, tmp_path: Path
) -> None:
    recipe = tiny("clip", *image, *text, *TWO_LAYERS, *LAST, "model.image.views_kept=3", "optimizer.lr=0.01")
    run = set_up(recipe, tmp_path / "run", False, loop.Ranks())
    model = run.model.train()
    kept = batch_maker(run).make(0)
    towers = model.view_size, model.context_length, model.tokenizer, model.full_captions
    drawn = BatchMaker(run.images, recipe, *towers).make(0)
    assert kept.kept_images is not None
    assert kept.kept_texts is not None
    assert kept.images.numel() == 0
    assert torch.equal(kept.tokens, drawn.tokens)
    # The views that are kept, as pixels: what the batch would be without anything kept.
    views = []
    for row, index in enumerate(kept.sample_ids.tolist()):
        rng = np.random.default_rng([recipe.seed, index, 2])
        pixels = [view for view, _ in run.images.views(index, model.view_size, [recipe.data.images] * 3, rng)]
        which = [np.array_equal(kept.kept_images[0, row], view) for view in run.kept.images[index]]  # type: ignore[index]
        views.append(pixels[which.index(True)])
    plain = replace(drawn, images=torch.from_numpy(np.stack(views)[None]))
    found = []
    for batch in (kept, plain):
        model.zero_grad()
        features = model(batch)
        (features.image.square().sum() + features.text["caption"].square().sum()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((features, gradients))
    (ours, own), (theirs, their) = found
    torch.testing.assert_close(ours.image, theirs.image, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ours.text["caption"], theirs.text["caption"], rtol=1e-2, atol=1e-2)
    assert own.keys() == their.keys()
    for name, gradient in own.items():
        assert (gradient - their[name]).norm() <= 0.03 * their[name].norm() + 1e-3, name
    for name in own:
        assert not name.startswith(("clip.token_embedding", "clip.positional_embedding", "clip.visual.conv1")), name
    assert any("resblocks.1." in name for name in own)
    assert not any("transformer.resblocks.0." in name for name in own)


def test_what_is_kept_is_mixed(tiny: MakeRecipe, tmp_path: Path) -> None:
    run = set_up(
        tiny("clip", "model.image.layers=2", *TWO_LAYERS, *LAST, "data.mix=0.5"), tmp_path / "run", False, loop.Ranks()
    )
    model, batch = run.model.eval(), batch_maker(run).make(0)
    assert batch.kept_images is not None
    assert batch.own_share is not None
    rows = batch.kept_images[0].float()
    partners = rows[[1, 0, 3, 2, 5, 4, 7, 6]]
    with torch.no_grad():
        expected = model.images_above(batch.own_share * rows + (1 - batch.own_share) * partners).embedding
        torch.testing.assert_close(model(batch).image[0], expected)
    summary = declip.train(run.recipe, tmp_path / "trained", quiet=True)
    assert math.isfinite(summary["held_out_score"])


def test_the_end_token_is_kept_where_captions_are_padded_with_it(tiny: MakeRecipe, tmp_path: Path) -> None:
    run = set_up(tiny("clip", *TWO_LAYERS, "model.image.layers=2", *LAST), tmp_path / "run", False, loop.Ranks())
    tokenizer, plain = run.model.tokenizer, locked._token_ends(run.model, run.images)
    end = int(run.model.token_ids(["a"])[0, -1])
    special = tokenizer.special
    tokenizer.special = special._replace(pad=end)  # type: ignore[misc]
    try:
        assert np.array_equal(locked._token_ends(run.model, run.images), plain)
    finally:
        tokenizer.special = special  # type: ignore[misc]


@pytest.mark.parametrize("image", ["model.image.layers=2", RESNET, TIMM])
def test_only_the_last_layers_change(image: str, tiny: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny("clip", image, *TWO_LAYERS, *LAST, "optimizer.lr=0.01")
    declip.train(recipe, tmp_path / "run", quiet=True)
    found = changed(recipe, tmp_path / "run")
    assert {"text_projection", "transformer.resblocks.1.mlp.c_fc.weight"} <= found
    assert not [
        name for name in found if "resblocks.0." in name or "running_" in name or name == "token_embedding.weight"
    ]
    assert [name for name in found if name.startswith("visual.")]


def test_states_too_many_for_the_disk_are_computed_each_step(
    tiny: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny("clip", *TWO_LAYERS, "model.image.layers=2", *LAST, "data.disk_gb=1e-6", "schedule.pairs_seen=16")
    declip.train(recipe, tmp_path / "run", quiet=True)
    assert "it is not kept but computed at each step" in capsys.readouterr().err
    assert not changed(recipe, tmp_path / "run") & {"visual.conv1.weight", "token_embedding.weight"}


def test_more_layers_than_there_are(tiny: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.text\.tune_layers = 3: this tower has 2 layers, of which one"):
        declip.train(
            tiny("clip", *TWO_LAYERS, "model.text.tune=last", "model.text.tune_layers=3"), tmp_path / "run", quiet=True
        )


def test_a_tower_that_cannot_go_on_from_its_middle(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DualEncoder, "texts_above", lambda self, tokens, states: self.texts_above_wrongly)
    wrong = EncodedTexts(torch.zeros(2, 16), torch.zeros(2, 1, 8), torch.zeros(2, 8))
    monkeypatch.setattr(DualEncoder, "texts_above_wrongly", wrong, raising=False)
    with pytest.raises(
        InputError, match=r"model\.text\.tune = last: this tower cannot go on .* model\.text\.kept=false"
    ):
        declip.train(tiny("clip", *TWO_LAYERS, "model.image.layers=2", *LAST), tmp_path / "run", quiet=True)
