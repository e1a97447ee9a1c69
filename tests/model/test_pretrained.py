"""Models to use: a finished run is an open_clip model, and takes what people have at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import pair, write_pairs
from PIL import Image
from torch.nn import functional as F

import declip
from declip.data.decode import decode_image
from declip.errors import InputError
from declip.model.pretrained import LoadedModel
from declip.recipe import load_recipe

TEXTS = ["a red cat", "", "a green dog, " * 50, "Ünïcode 😄"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    from conftest import TERMS, TINY

    folder = tmp_path_factory.mktemp("run")
    pairs = write_pairs(folder / "pairs.parquet", [pair(number) for number in range(20)])
    (folder / "tiny.toml").write_text(f"{TINY}\n{TERMS['clip']}")
    recipe = load_recipe(folder / "tiny.toml", [f"data.train={str(pairs)!r}", "schedule.pairs_seen=16"])
    declip.train(recipe, folder / "run", quiet=True)
    return folder / "run"


@pytest.fixture(scope="module")
def model(run: Path) -> LoadedModel:
    return declip.load(run)


def pixels(number: int) -> np.ndarray:
    return decode_image(pair(number)["image"])


def test_finished_run_is_an_open_clip_model(run: Path, model: LoadedModel) -> None:
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{run}")
    clip.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{run}")
    images = [Image.fromarray(pixels(number)) for number in range(3)]
    with torch.inference_mode():
        image = clip.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
        text = clip.encode_text(tokenizer(TEXTS), normalize=True)
    assert image.shape == (3, 16)
    torch.testing.assert_close(model.encode_image(images), image)
    torch.testing.assert_close(model.encode_text(TEXTS), text, rtol=1e-4, atol=1e-5)


def test_local_dir_is_the_run(run: Path, model: LoadedModel) -> None:
    other = declip.load(f"local-dir:{run}")
    assert torch.equal(other.encode_text("a cat"), model.encode_text("a cat"))


def test_images_of_any_kind(model: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(pair(3)["image"])
    kinds = [path, str(path), pixels(3), Image.open(path)]
    expected = model.encode_image(pixels(3))
    assert expected.shape == (1, 16)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(expected.norm(dim=-1), torch.ones(1))
    for kind in kinds:
        torch.testing.assert_close(model.encode_image(kind), expected, msg=str(type(kind)))
    together = model.encode_image(iter([*kinds, pixels(4)]), batch_size=2)
    torch.testing.assert_close(together[:4], expected.expand(4, -1))
    torch.testing.assert_close(together[4:], model.encode_image(pixels(4)))


def test_transparent_parts_are_white_as_in_training(model: LoadedModel, tmp_path: Path) -> None:
    drawing = np.zeros((20, 20, 4), np.uint8)
    drawing[5:12, 5:12] = (200, 30, 60, 255)
    path = tmp_path / "drawing.png"
    Image.fromarray(drawing).save(path)
    expected = model.encode_image(decode_image(path.read_bytes()))
    torch.testing.assert_close(model.encode_image(path), expected)
    torch.testing.assert_close(model.encode_image(Image.open(path)), expected)


def test_texts(model: LoadedModel) -> None:
    together = model.encode_text(TEXTS, batch_size=3)
    assert together.shape == (4, 16)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(4))
    for row, text in zip(together, TEXTS, strict=True):
        torch.testing.assert_close(model.encode_text(text)[0], row, rtol=1e-4, atol=1e-5)


def test_classify(model: LoadedModel) -> None:
    images, labels = [pixels(0), pixels(1), pixels(2)], ["cat", "traffic_light", "dog"]
    rows = model.classify(images, labels, ["a photo of a {}.", "the {}"])
    assert len(rows) == 3
    prompts = [[f"a photo of a {name}.", f"the {name}"] for name in ("cat", "traffic light", "dog")]
    classes = torch.stack([F.normalize(model.encode_text(pair).mean(0), dim=-1) for pair in prompts])
    scale = model.clip.logit_scale.exp().detach()  # type: ignore[operator]
    expected = (scale * model.encode_image(images) @ classes.T).softmax(dim=-1)
    for row, probabilities in zip(rows, expected.tolist(), strict=True):
        assert sum(row.values()) == pytest.approx(1)
        assert list(row.values()) == sorted(row.values(), reverse=True)
        assert [row[label] for label in labels] == pytest.approx(probabilities, rel=1e-4)
    assert model.classify(images[0], ["cat", "dog"])[0].keys() == {"cat", "dog"}
    assert model.classify([], labels) == []


def test_embeddings_can_be_trained_on(model: LoadedModel) -> None:
    """A linear probe, say, needs their values in its backward pass."""
    probe = torch.zeros(16, requires_grad=True)
    (model.encode_image(pixels(0)) @ probe + model.encode_text("a cat") @ probe).sum().backward()
    assert probe.grad is not None


def test_evaluate_takes_a_run(run: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "unseen.parquet", [pair(number) for number in range(100, 106)])
    result = declip.evaluate(run, str(pairs), templates=["a {}"])
    assert result["model"] == str(run)
    assert [row["task"] for row in result["results"]] == ["retrieval", "zero-shot"]
    assert result["results"][0]["metrics"]["text_to_image_r10"] == 100.0


# What cannot be opened


def no_run(folder: Path, run: Path) -> str:
    return str(folder)


def no_such_name(folder: Path, run: Path) -> str:
    return "ViT-Z:openai"


def no_tag(folder: Path, run: Path) -> str:
    return "ViT-B-32"


def cut_off(folder: Path, run: Path) -> str:
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (folder / name).write_bytes((run / name).read_bytes())
    os.truncate(folder / "open_clip_model.safetensors", 1000)
    return str(folder)


def no_json(folder: Path, run: Path) -> str:
    cut_off(folder, run)
    (folder / "open_clip_config.json").write_text("{")
    return str(folder)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (no_run, "holds no finished model: train one there first"),
        (no_such_name, "There is no model 'ViT-Z:openai'"),
        (no_tag, "There is no model 'ViT-B-32'"),
        (cut_off, "cannot be opened"),
        (no_json, "cannot be opened"),
    ],
)
def test_no_model(spoil: Callable[[Path, Path], str], says: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as error:
        declip.load(spoil(tmp_path, run))
    assert "\n" not in str(error.value)


def test_no_image(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name in ("broken.png", "gone.png"):
        with pytest.raises(InputError, match=rf"{name}' cannot be read"):
            model.encode_image(tmp_path / name)


def test_weights_only(run: Path) -> None:
    """The tensors of open_clip's model and no other: no heads, no mask embedding."""
    from safetensors.torch import load

    clip = open_clip.create_model(f"local-dir:{run}")
    names = load((run / "open_clip_model.safetensors").read_bytes()).keys()
    assert names == clip.state_dict().keys()
