"""Released files of the public code: made from the golden states, read, converted, opened by open_clip, trained on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import pair, write_pairs
from PIL import Image
from released import HEADS, TO_OURS, State, golden, make_file, released_state, resnet, save, vit
from safetensors.torch import load_file
from torch import Tensor, nn

import declip
from declip.cli import main
from declip.data.tokenizer import CLIP_TOKENS
from declip.errors import InputError
from declip.model.embed import embed_images, embed_texts
from declip.model.heads import ContrastiveHead, Predictor, Projector
from declip.model.pretrained import read_model
from declip.model.released import ROWS, read_released
from declip.model.token_similarity import similarity
from declip.recipe import load_recipe

METHODS = ("clip", "slip", "filip", "declip", "defilip")


@pytest.mark.parametrize("method", METHODS)
def test_converted_file_gives_the_stored_embeddings_in_open_clip(tmp_path: Path, method: str) -> None:
    folder = tmp_path / "converted"
    assert main(["convert", str(make_file(tmp_path, method)), str(folder), *HEADS, "--json"]) == 0
    clip = open_clip.create_model(f"local-dir:{folder}").eval()
    tensors = golden(method)
    with torch.inference_mode():
        if method in ("clip", "filip"):  # stored after the step; without batch norm in the towers that is before it too
            images = clip.encode_image(tensors["io.images"][:, :3])
            torch.testing.assert_close(images, tensors["io.image_embedding_0"], rtol=1e-5, atol=1e-5)
        texts = clip.encode_text(TO_OURS[tensors["io.text_tokens_eval"]])
    torch.testing.assert_close(texts, tensors["io.text_embedding"], rtol=1e-5, atol=1e-5)


def test_all_views_of_declip(tmp_path: Path) -> None:
    model = declip.load(make_file(tmp_path, "declip"), image_heads=2, text_heads=2)
    tensors = golden("declip")
    for view in (0, 1):
        with torch.inference_mode():
            found = model.clip.encode_image(tensors["io.images"][:, 3 * view : 3 * view + 3])  # type: ignore[operator]
        torch.testing.assert_close(found, tensors[f"io.image_embedding_{view}"], rtol=1e-5, atol=1e-5)


def test_heads_are_kept_apart(tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    assert main(["convert", str(make_file(tmp_path, "defilip")), str(folder), *HEADS, "--json"]) == 0
    heads, state = load_file(folder / "declip_heads.safetensors"), released_state("defilip")
    assert {name.partition(".")[0] for name in heads} == {
        "mask_embedding",
        "masked_language",
        "simsiam",
        "token_wise",
    }
    words = state["module.text_label_predictor.weight"]
    assert torch.equal(heads["masked_language.head.weight"][49408], words[49406])  # the mask token's row
    assert torch.equal(heads["masked_language.head.weight"][49407], words[49408])  # the end token's
    assert torch.equal(heads["mask_embedding"], state["module.encode_text.token_embedding.weight"][49406])
    assert torch.equal(heads["token_wise.logit_scale"], state["module.logit_scale_dense"])
    assert not [name for name in load_file(folder / "open_clip_model.safetensors") if "predictor" in name]


def test_summary_and_preprocessing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "converted"
    main(["convert", str(make_file(tmp_path, "slip")), str(folder), *HEADS, "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert summary["heads"] == ["simclr"]
    assert (summary["image_tower"], summary["text_tower"]) == ("2 layers × 64, 64 px", "2 layers × 16")
    preprocessing = json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert preprocessing["mean"] == [0.485, 0.456, 0.406]
    # Shorter side to 256 / 224 of the size, then the central square: a black frame is cut away.
    image = np.zeros((146, 146, 3), np.uint8)
    image[9:-9, 9:-9] = 255
    pixels = declip.load(folder).preprocess(Image.fromarray(image))
    assert pixels.shape == (3, 64, 64)
    assert float(pixels[:, 2:-2, 2:-2].min()) > 2


def test_filip_is_scored_token_by_token(tmp_path: Path) -> None:
    """§5: image tokens against class tokens, prompts averaged position by position, all 77 positions counting."""
    model = declip.load(make_file(tmp_path, "filip"), image_heads=2, text_heads=2)
    assert model.token_wise is not None
    assert not model.token_wise.mask_padding
    tensors = golden("filip")
    clip = model.clip
    with torch.inference_mode():
        images = embed_images(clip, tensors["io.images"][:, :3], model.token_wise)
        texts = embed_texts(clip, TO_OURS[tensors["io.text_tokens_eval"]], 0, model.token_wise)
        assert images.shape == (8, 16, 24)
        assert texts.shape == (8, 77, 24)
        state = released_state("filip")
        dense = _dense_tokens(clip, tensors["io.images"][:, :3])
        mapped = dense @ state["module.image_mapping.weight"].T + state["module.image_mapping.bias"]
        mapped = mapped / mapped.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(images, mapped, rtol=1e-4, atol=1e-5)
    expected = torch.einsum("iad,tbd->itab", images, texts).amax(-1).mean(-1)
    torch.testing.assert_close(similarity(images, texts), expected, rtol=1e-5, atol=1e-5)
    rows = model.classify(np.zeros((64, 64, 3), np.uint8), ["cat", "dog"], ["a {}", "the {}"])
    assert sum(rows[0].values()) == pytest.approx(1)
    prompts = model.encode_text(["a cat", "the cat", "a dog", "the dog"]).view(2, 2, 77, 24).mean(1)
    classes = 77**0.5 * prompts / prompts.flatten(1).norm(dim=-1)[:, None, None]  # the same factor for every class
    scores = torch.einsum("ad,tbd->tab", model.encode_image(np.zeros((64, 64, 3), np.uint8))[0], classes)
    scores = scores.amax(-1).mean(-1) * released_state("filip")["module.logit_scale_dense"].exp()
    assert rows[0]["cat"] == pytest.approx(float(scores.softmax(0)[0]), rel=1e-4)


def _dense_tokens(clip: nn.Module, images: Tensor) -> Tensor:
    """A ViT's patches before its last norm, caught on the way."""
    caught: list[Tensor] = []
    handle = clip.visual.transformer.register_forward_hook(lambda *args: caught.append(args[2]))  # type: ignore[union-attr, operator]
    clip.encode_image(images)  # type: ignore[operator]
    handle.remove()
    return caught[0][:, 1:]


def test_evaluate_a_released_filip(tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    assert main(["convert", str(make_file(tmp_path, "filip")), str(folder), *HEADS, "--json"]) == 0
    pairs = write_pairs(tmp_path / "unseen.parquet", [pair(number) for number in range(12)])
    result = declip.evaluate(str(folder), str(pairs), templates=["a {}"])
    assert [row["task"] for row in result["results"]] == ["retrieval", "zero-shot"]


# Full-size layouts, with few layers


@pytest.mark.parametrize("build", [lambda: vit(768, 3072, 32), lambda: resnet(1024)])
def test_architecture_from_shapes(tmp_path: Path, build: Callable[[], State]) -> None:
    state = build()
    finished = read_released(save(tmp_path / "file.pth.tar", state))
    config = finished.config["model_cfg"]
    assert config["embed_dim"] == state["module.encode_text.text_projection.bias"].shape[0]
    assert (config["text_cfg"]["heads"], config["vision_cfg"]["image_size"]) == (8, 224)
    model = declip.load(tmp_path / "file.pth.tar")
    assert model.encode_image(np.zeros((300, 250, 3), np.uint8)).shape == (1, config["embed_dim"])
    assert model.encode_text("a cat").shape == (1, config["embed_dim"])


@pytest.mark.parametrize("prefix", ["module.visual.", "module.", "visual.", ""])
@pytest.mark.parametrize("build", [lambda: vit(64, 3072, 32, 64), lambda: resnet(1024, 64)])
def test_image_tower_alone(tmp_path: Path, prefix: str, build: Callable[[], State]) -> None:
    whole = {name: t for name, t in build().items() if name.startswith("module.visual.")}
    state = {prefix + name.removeprefix("module.visual."): tensor for name, tensor in whole.items()}
    model = declip.load(save(tmp_path / "image.pth.tar", state))
    image = np.random.default_rng(0).integers(0, 255, (250, 300, 3)).astype(np.uint8)
    embedding = model.encode_image(image)
    assert embedding.shape[0] == 1
    with pytest.raises(InputError, match="holds an image tower alone"):
        model.encode_text("a cat")
    folder = tmp_path / "converted"
    assert main(["convert", str(tmp_path / "image.pth.tar"), str(folder), "--json"]) == 0
    assert torch.equal(declip.load(folder).encode_image(image), embedding)
    assert main(["convert", str(folder), str(tmp_path / "hf"), "--to", "huggingface"]) == 2


# Training goes on


def test_training_goes_on_from_a_released_file(tmp_path: Path) -> None:
    """The first step of the converted file's own method costs what the stored weights cost, not what random ones do."""
    pairs = write_pairs(tmp_path / "pairs.parquet", [pair(number) for number in range(16)])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        """
[data]
workers = 0
holdout = 0.0
[model]
embed_dim = 48
quick_gelu = true
normalization = "imagenet"
image = { image_size = 64, layers = 2, width = 64, head_width = 32, patch_size = 16 }
text = { layers = 2, width = 16, heads = 2, proj_bias = true }
[terms.contrastive]
images = 2
texts = ["masked", "augmented"]
[terms.simsiam]
width = 64
bottleneck = 32
[terms.masked_language]
[terms.nearest_neighbour]
queue_size = 32
[optimizer]
lr = 1e-9
[schedule]
batch_size = 8
pairs_seen = 8
[engine]
device = "cpu"
precision = "float32"
"""
    )
    folder = tmp_path / "converted"
    main(["convert", str(make_file(tmp_path, "declip")), str(folder), *HEADS, "--json"])
    out = tmp_path / "out"
    declip.train(load_recipe(recipe, [f"data.train={str(pairs)!r}", f"model.init={str(folder)!r}"]), out, quiet=True)
    before, after = read_model(str(folder)), read_model(str(out))
    assert before.weights.keys() == after.weights.keys()
    for name, tensor in before.weights.items():
        torch.testing.assert_close(after.weights[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    for name, tensor in before.heads.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(after.heads[name], tensor, rtol=1e-3, atol=1e-5, msg=name)

    for change, says in (
        ("model.text.width=32", "of another architecture: model.text.width is 16 there, 32 in the recipe"),
        ("terms.simsiam.width=32", "simsiam is of another architecture: predictor.layer2.bias has the shape [64]"),
        ("model.normalization=clip", "was trained with model.normalization = imagenet, the recipe says clip"),
        ("model.init=nowhere", "There is no model 'nowhere'"),
    ):
        changes = [f"data.train={str(pairs)!r}", f"model.init={str(folder)!r}", change]
        with pytest.raises(InputError) as error:
            declip.train(load_recipe(recipe, changes), tmp_path / "other", quiet=True)
        assert says in str(error.value)
        assert not (tmp_path / "other").exists()


def test_head_names_are_complete() -> None:
    """The tensors that a head must have are those of our modules."""
    from declip.model.released import HEAD_TENSORS

    assert HEAD_TENSORS["projector."] == Projector(2, 3).state_dict().keys()
    assert HEAD_TENSORS["predictor."] == Predictor(2, 3).state_dict().keys()
    assert HEAD_TENSORS["predictor_sim."] == ContrastiveHead(2, 3, 4).state_dict().keys()
    assert len(ROWS) == len(set(ROWS.tolist())) == 49409
    assert TO_OURS[49406] == CLIP_TOKENS.mask


def test_convert_needs_no_training_code() -> None:
    code = "import sys; from declip.cli import main; main(['convert', 'nowhere', 'x'])\n"
    code += "print('declip.training' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
