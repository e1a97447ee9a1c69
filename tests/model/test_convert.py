"""One model in every format: the embeddings stay, and what a format cannot hold is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

import declip
from declip.cli import main
from declip.errors import InputError
from declip.model.convert import convert
from declip.recipe import Recipe

transformers = pytest.importorskip("transformers")

IMAGES = [np.random.default_rng(number).integers(0, 255, (40, 30, 3)).astype(np.uint8) for number in range(3)]
TEXTS = ["a red cat", "two dogs, and a tree!"]


@pytest.fixture
def run(tiny: Callable[..., Recipe], tmp_path: Path) -> Path:
    """A finished run of CLIP."""
    declip.train(tiny("clip"), tmp_path / "run", quiet=True)
    return tmp_path / "run"


def embeddings(model: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    loaded = declip.load(model)
    return loaded.encode_image(IMAGES), loaded.encode_text(TEXTS)


def assert_same(one: str | Path, other: str | Path) -> None:
    for ours, theirs in zip(embeddings(one), embeddings(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_run_becomes_a_clip_model_and_comes_back(run: Path, tmp_path: Path) -> None:
    assert main(["convert", str(run), str(tmp_path / "hf"), "--to", "huggingface", "--json"]) == 0
    model = transformers.CLIPModel.from_pretrained(str(tmp_path / "hf"))
    found = model.get_text_features(
        **transformers.CLIPTokenizer.from_pretrained(str(tmp_path / "hf"))(TEXTS, padding=True, return_tensors="pt")
    )
    found = getattr(found, "pooler_output", found)
    expected = embeddings(run)[1]
    torch.testing.assert_close(torch.nn.functional.normalize(found, dim=-1), expected, rtol=1e-4, atol=1e-5)
    assert_same(run, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "back")
    assert_same(run, tmp_path / "back")
    clip = open_clip.create_model(f"local-dir:{tmp_path / 'back'}")
    assert clip.state_dict().keys() == open_clip.create_model(f"local-dir:{run}").state_dict().keys()


def test_training_starts_from_a_clip_model(run: Path, tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    convert(run, tmp_path / "hf", to="huggingface")
    start = f"model.init={str(tmp_path / 'hf')!r}"
    declip.train(tiny("clip", start, "optimizer.lr=1e-12", "schedule.pairs_seen=8"), tmp_path / "on", quiet=True)
    assert_same(run, tmp_path / "on")


def test_a_head_of_other_words_starts_anew(
    tiny: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The words in use are those of the first captions only, so the second run has more of them."""
    few = "terms.masked_language.vocabulary=used"
    declip.train(tiny("declip", few, "data.fraction=0.25"), tmp_path / "one", quiet=True)
    start = f"model.init={str(tmp_path / 'one')!r}"
    for more in ([few], []):
        out = tmp_path / f"two{len(more)}"
        declip.train(tiny("declip", start, "optimizer.lr=1e-12", "schedule.pairs_seen=8", *more), out, quiet=True)
        assert_same(tmp_path / "one", out)
        assert "has no head for masked_language that fits, it starts anew" in capsys.readouterr().err


def test_an_open_clip_folder_stays_what_it_is(run: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "copy")
    assert_same(run, tmp_path / "copy")
    assert (tmp_path / "copy" / "open_clip_model.safetensors").is_file()


def test_a_resnet_is_no_clip_model(
    tiny: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tower = ["model.image.layers=[1,1,1,1]", "model.image.image_size=32", "model.image.width=8"]
    declip.train(tiny("clip", *tower), tmp_path / "run", quiet=True)
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "hf"), "--to", "huggingface"]) == 2
    assert "whose image tower is no ResNet" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", "cannot be opened"),
        ("[]", "it has no model_cfg"),
        ('{"model_cfg": []}', "it has no model_cfg"),
        ('{"model_cfg": {"embed_dim": 16, "vision_cfg": {}}}', "its text_cfg is no table of settings"),
        ('{"model_cfg": {"vision_cfg": {}, "text_cfg": {}}}', "its embed_dim is no number"),
        ('{"model_cfg": {"embed_dim": 16, "vision_cfg": {}, "text_cfg": {}}, "declip": 3}', "its declip is no table"),
        (
            '{"model_cfg": {"embed_dim": 16, "vision_cfg": {}, "text_cfg": {}}, "declip": {"similarity": "tokenwise"}}',
            "similarity = 'tokenwise' is neither embedding nor token_wise",
        ),
        (
            '{"model_cfg": {"embed_dim": 16, "vision_cfg": {}, "text_cfg": {}}}',
            "of another architecture: ln_final.bias has the shape [8], not [512]",
        ),
    ],
)
def test_a_damaged_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, says: str
) -> None:
    (run / "open_clip_config.json").write_text(config)
    capsys.readouterr()
    for argv in (["evaluate", str(run), "demo:noto"], ["convert", str(run), str(tmp_path / "new")]):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert says in error
        assert "Traceback" not in error
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("spoil", ["missing", "left over"])
def test_tensors_that_do_not_fit_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: str
) -> None:
    path = run / "open_clip_model.safetensors"
    tensors = load_file(path)
    if spoil == "missing":
        del tensors["visual.ln_pre.bias"]
    else:
        tensors["adapter.weight"] = torch.zeros(2)
    save_file(tensors, path)
    for argv in (["evaluate", str(run), "demo:noto"], ["convert", str(run), str(tmp_path / "new")]):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert ("visual.ln_pre.bias is missing" if spoil == "missing" else "adapter.weight is left over") in error
        assert not (tmp_path / "new").exists()


def test_places_and_options_that_will_not_do(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for argv, says in (
        ([str(run), str(tmp_path / "file" / "new")], "cannot be made"),
        ([str(run), str(tmp_path / "new"), "--image-heads", "2"], "is no released file"),
    ):
        assert main(["convert", *argv]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model.quick_gelu=true", "quick_gelu is False there, True in the recipe"),
        ("model.image.head_width=16", "model.image.head_width is 32 there, 16 in the recipe"),
        ("model.text.heads=2", "model.text.heads is 1 there, 2 in the recipe"),
    ],
)
def test_the_same_tensors_in_another_computation(
    run: Path, tiny: Callable[..., Recipe], tmp_path: Path, change: str, says: str
) -> None:
    with pytest.raises(InputError) as error:
        declip.train(tiny("clip", f"model.init={str(run)!r}", change), tmp_path / "on", quiet=True)
    assert says in str(error.value)
