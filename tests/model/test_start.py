"""Starting from weights: what follows from them for the recipe, and that each tensor is in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from conftest import pair, write_pairs
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from safetensors.torch import save_file

import declip
from declip.errors import InputError
from declip.explain import commented_toml
from declip.model.dual_encoder import DualEncoder
from declip.model.pretrained import read_model
from declip.model.start import load_towers, read_start
from declip.recipe import Recipe, load_recipe, parse_recipe, to_toml

NETWORK = "resnet10t.c3_in1k"
TEXT: dict[str, Any] = {"layers": 1, "width": 32, "heads": 1}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm network's file, with its classifier."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "resnet10t.safetensors"
    save_file(timm.create_model(NETWORK).state_dict(), path)
    return path


@pytest.fixture
def run(tiny: Callable[..., Recipe], tmp_path: Path) -> Path:
    """A finished run of CLIP: a ViT and open_clip's own text tower."""
    declip.train(tiny("clip"), tmp_path / "run", quiet=True)
    return tmp_path / "run"


def started(recipe: Recipe) -> tuple[Recipe, DualEncoder, list[str]]:
    recipe, start = read_start(recipe)
    torch.manual_seed(1)
    model = DualEncoder(recipe)
    return recipe, model, load_towers(start, model.clip)


def test_a_timm_file_and_a_hugging_face_folder(weights: Path, bert: Path) -> None:
    from transformers import BertModel

    asked = [
        f"model.image.timm_model_name={NETWORK}",
        f"model.image.init={str(weights)!r}",
        f"model.text.init={str(bert)!r}",
        "model.image.image_size=64",
    ]
    recipe, model, anew = started(load_recipe("declip", asked))
    assert (recipe.model.embed_dim, recipe.model.image.image_size, recipe.model.normalization) == (512, 64, "imagenet")
    assert (recipe.model.text.context_length, model.tokenizer.special.mask) == (77, 4)
    assert not anew
    trunk, text = timm.create_model(NETWORK), BertModel.from_pretrained(bert).eval()
    trunk.load_state_dict(declip.model.export.read_weights(weights))
    pixels, tokens = torch.randn(2, 3, 64, 64), torch.randint(5, 20, (2, 6))
    model.eval()
    trunk.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model.clip.visual.trunk(pixels), trunk.forward_head(trunk.forward_features(pixels), pre_logits=True)
        )
        torch.testing.assert_close(
            model.clip.text.transformer(tokens).last_hidden_state, text(tokens).last_hidden_state
        )


def test_the_written_recipe_says_the_same_again(weights: Path, bert: Path, run: Path, tmp_path: Path) -> None:
    for asked in (
        [
            f"model.image.timm_model_name={NETWORK}",
            f"model.image.init={str(weights)!r}",
            f"model.text.init={str(bert)!r}",
        ],
        [f"model.init={str(run)!r}", "model.image.image_size=32"],
        [f"model.image.init={str(run)!r}"],
    ):
        once, _ = read_start(load_recipe("clip", asked))
        for text in (to_toml(once), commented_toml(once)):
            (tmp_path / "recipe.toml").write_text(text)
            assert read_start(load_recipe(tmp_path / "recipe.toml"))[0] == once == load_recipe(tmp_path / "recipe.toml")


def test_a_whole_model_at_another_size_is_open_clips(run: Path) -> None:
    asked = [f"model.init={str(run)!r}", "model.image.image_size=32", "model.text.context_length=24"]
    _, model, anew = started(load_recipe("siglip", [*asked, "model.logit_bias_init=-3"]))
    assert not anew
    assert float(model.clip.logit_bias.detach()) == -3
    stored = read_model(str(run)).weights
    expected = {name: tensor.clone() for name, tensor in stored.items()}
    resize_pos_embed(expected, model.clip)
    resize_text_pos_embed(expected, model.clip)
    here = {name: tensor for name, tensor in model.clip.state_dict().items() if name != "logit_bias"}
    assert here.keys() == expected.keys()
    changed = {name for name, tensor in here.items() if stored[name].shape != tensor.shape}
    assert changed <= {"visual.positional_embedding", "positional_embedding"}
    assert "visual.positional_embedding" in changed
    for name, tensor in here.items():
        if name != "positional_embedding":
            torch.testing.assert_close(tensor, expected[name], msg=name)
    short = model.clip.positional_embedding.shape[0]
    assert torch.equal(model.clip.positional_embedding, stored["positional_embedding"][:short])


@pytest.mark.parametrize("part", ["image", "text"])
def test_one_tower_of_a_model(part: str, run: Path) -> None:
    recipe, model, anew = started(load_recipe("clip", [f"model.{part}.init={str(run)!r}"]))
    stored = read_model(str(run)).weights
    of_part = {
        name for name in stored if name.startswith("visual.") == (part == "image") and not name.startswith("logit")
    }
    for name, tensor in model.clip.state_dict().items():
        same = name in stored and stored[name].shape == tensor.shape and torch.equal(stored[name], tensor)
        assert same == (name in of_part) or tensor.unique().numel() <= 2, name
    assert not anew
    assert recipe.model.embed_dim == open_clip.create_model(f"local-dir:{run}").text_projection.shape[1]
    _, _, anew = started(load_recipe("clip", [f"model.{part}.init={str(run)!r}", "model.embed_dim=24"]))
    assert anew == (["proj"] if part == "image" else ["text_projection"])


def test_longer_captions_stretch_positions_as_open_clip_does() -> None:
    from declip.model.positions import fit_length

    positions = torch.randn(10, 4)
    state = {"positional_embedding": positions}

    class Model:
        positional_embedding = torch.empty(25, 4)

    resize_text_pos_embed(state, Model())
    torch.testing.assert_close(fit_length(positions, 25), state["positional_embedding"])
    assert torch.equal(fit_length(positions, 7), positions[:7])


def test_a_timm_vit_at_another_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(own.state_dict(), tmp_path / "vit.safetensors")
    asked = [
        "model.image.timm_model_name=vit_tiny_patch16_224",
        f"model.image.init={str(tmp_path / 'vit.safetensors')!r}",
    ]
    _, model, _ = started(load_recipe("clip", [*asked, "model.image.image_size=96"]))
    own.set_input_size(img_size=96)
    torch.testing.assert_close(model.clip.visual.trunk.pos_embed, own.pos_embed, rtol=1e-4, atol=1e-4)


def test_pixels_without_a_name_are_numbers(run: Path) -> None:
    import json

    config = json.loads((run / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (run / "open_clip_config.json").write_text(json.dumps(config))
    recipe, model, _ = started(load_recipe("clip", [f"model.init={str(run)!r}"]))
    assert recipe.model.normalization == ((0.1, 0.2, 0.3), tuple(config["preprocess_cfg"]["std"]))
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]) * 255)
    assert load_recipe("clip", ["model.normalization=[[0.1, 0.2, 0.3], [1, 1, 1]]"]).model.normalization[0] == (
        0.1,
        0.2,
        0.3,
    )


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["model.image.init=resnet10tt"], "timm knows no network 'resnet10tt'"),
        (["model.image.init={weights}"], "does not say of which network it is: name it"),
        (
            ["model.image.init={weights}", "model.image.timm_model_name=resnet18"],
            "of another architecture: conv1.0.weight is left over",
        ),
        (
            ["model.image.init={weights}", "model.image.timm_model_name=resnett"],
            "timm knows no network 'resnett'; the nearest",
        ),
        (["model.text.init={folder}"], "holds no model: it has neither config.json nor open_clip's files"),
        (["model.text.init={run}", "model.text.width=48"], "model.text.width is"),
        (["model.init={run}", "model.text.init={run}"], "model.init gives both towers"),
        (
            ["model.init={run}", "model.normalization=half"],
            "was trained with model.normalization = clip, the recipe says half",
        ),
        (["model.init={run}", "model.embed_dim=3"], "model.embed_dim is"),
        (["model.init={run}", "model.name=RN50"], "model.name says which towers to build"),
        (
            ["model.init={run}", "model.image.timm_model_name=resnet18"],
            "model.image.timm_model_name = 'resnet18' is not its own",
        ),
        (["model.init={run}", "model.image.image_size=7"], "smaller than a patch"),
    ],
)
def test_what_does_not_fit(asked: list[str], says: str, weights: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    places = {"weights": weights, "run": run, "folder": tmp_path / "folder"}
    with pytest.raises(InputError) as error:
        started(load_recipe("clip", [one.format(**places) for one in asked]))
    assert says in str(error.value)


def test_a_pickled_file_is_read_as_tensors_alone(weights: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model(NETWORK).state_dict(), tmp_path / "good.pth")
    torch.save({"a": Path("x")}, tmp_path / "bad.pth")
    asked = [f"model.image.timm_model_name={NETWORK}", "model.image.image_size=64"]
    started(load_recipe("clip", [*asked, f"model.image.init={str(tmp_path / 'good.pth')!r}"]))
    with pytest.raises(InputError, match="holds more than tensors"):
        started(load_recipe("clip", [*asked, f"model.image.init={str(tmp_path / 'bad.pth')!r}"]))


def test_a_recipe_without_weights_stays_as_it_is() -> None:
    recipe = parse_recipe({"model": {"text": TEXT}})
    assert read_start(recipe)[0] is recipe


def test_captions_in_another_language_are_said(
    bert: Path, tiny: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from declip.data.sources import open_sources
    from declip.training.pairs import unknown_share

    rows = [{**pair(number), "captions": ["a red \u732b", "x"]} for number in range(40)]
    write_pairs(tmp_path / "pairs.parquet", rows)
    recipe = tiny("clip", f"model.text.init={str(bert)!r}", "schedule.pairs_seen=8")
    _, model, _ = started(recipe)
    assert unknown_share(open_sources([str(tmp_path / "pairs.parquet")], recipe.data), model.tokenizer) == 1 / 3
    declip.train(recipe, tmp_path / "run", quiet=True)
    assert "knows no word for 33% of what the captions of" in capsys.readouterr().err


def test_training_goes_on_with_resume(weights: Path, bert: Path, tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    asked = [
        f"model.image.timm_model_name={NETWORK}",
        f"model.image.init={str(weights)!r}",
        f"model.text.init={str(bert)!r}",
    ]
    recipe = tiny("declip", *asked, "model.image.image_size=32", "schedule.pairs_seen=16")
    declip.train(recipe, tmp_path / "run", quiet=True)
    loaded = declip.load(tmp_path / "run")
    assert loaded.encode_text(["a red cat"]).shape == (1, 512)
    declip.train(recipe, tmp_path / "run", resume=True, quiet=True)
    on = tiny("declip", f"model.init={str(tmp_path / 'run')!r}", "optimizer.lr=1e-12", "schedule.pairs_seen=8")
    declip.train(on, tmp_path / "on", quiet=True)
    again = declip.load(tmp_path / "on")
    torch.testing.assert_close(
        again.encode_text(["a red cat"]), loaded.encode_text(["a red cat"]), rtol=1e-4, atol=1e-4
    )
