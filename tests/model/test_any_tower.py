"""timm's image towers and Hugging Face's text towers: embeddings as open_clip's, tokens, masks, whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

import declip
from declip.data.captions import tokenize, tokenize_masked
from declip.data.huggingface_tokenizer import HuggingFaceTokenizer
from declip.errors import InputError
from declip.model.dual_encoder import DualEncoder
from declip.model.image_tower import encode_image, image_widths
from declip.model.layers import text_above, text_below
from declip.model.text_tower import GROUP, encode_text, text_facts
from declip.model.towers import build_towers
from declip.recipe import Recipe, load_recipe, parse_recipe

TEXT: dict[str, Any] = {"layers": 1, "width": 32, "heads": 1}


def timm_tower(name: str, size: int, **more: Any) -> dict[str, Any]:
    image = {"timm_model_name": name, "image_size": size, **more}
    return {"embed_dim": 16, "image": image, "text": TEXT}


@pytest.mark.parametrize(
    ("name", "size", "more", "tokens"),
    [
        ("resnet10t", 64, {}, 4),
        ("mobilenetv3_small_050", 64, {"timm_proj": ""}, 4),  # its own classifier projects
        ("vit_tiny_patch16_224", 224, {"timm_pool": "token"}, 196),  # a class token that is no place
        ("vit_tiny_patch16_224", 224, {"timm_pool": "avg"}, 196),
        ("swin_tiny_patch4_window7_224", 224, {}, 49),  # channels last
    ],
)
def test_timm_towers_are_open_clips(name: str, size: int, more: dict[str, Any], tokens: int) -> None:
    torch.manual_seed(0)
    clip = build_towers(parse_recipe({"model": timm_tower(name, size, **more)}).model).eval()
    pixels = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        found = encode_image(clip, pixels)
        torch.testing.assert_close(found.embedding, clip.encode_image(pixels), rtol=1e-5, atol=1e-5)
    assert found.tokens is not None
    assert found.tokens.shape[:2] == (2, tokens)
    assert (found.pooled is None) == (more.get("timm_proj") == "")
    width = None if found.pooled is None else found.pooled.shape[1]
    assert image_widths(clip, size) == (16, width, found.tokens.shape[2])


def test_tokens_are_in_their_place() -> None:
    """Changing one corner of the image changes the tokens of that corner most."""
    torch.manual_seed(0)
    for name, size, side in (("resnet10t", 128, 4), ("swin_tiny_patch4_window7_224", 224, 7)):
        clip = build_towers(parse_recipe({"model": timm_tower(name, size)}).model).eval()
        pixels = torch.zeros(2, 3, size, size)
        pixels[1, :, : size // side, -size // side :] = 3  # top right
        with torch.inference_mode():
            one, other = encode_image(clip, pixels).tokens  # type: ignore[misc]
        assert int((one - other).norm(dim=-1).argmax()) == side - 1, name


def test_tokens_of_open_clips_own_towers() -> None:
    for image, count in (
        ({"image_size": 16, "layers": 1, "width": 32, "head_width": 32, "patch_size": 8}, 4),
        ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}, 4),
    ):
        clip = build_towers(parse_recipe({"model": {"embed_dim": 16, "image": image, "text": TEXT}}).model)
        found = encode_image(clip, torch.randn(3, 3, image["image_size"], image["image_size"]))  # type: ignore[arg-type]
        assert found.tokens is not None
        assert found.tokens.shape[:2] == (3, count)
        assert found.pooled is not None
        projected = found.pooled @ clip.visual.proj if count == 4 and "patch_size" in image else None
        if projected is not None:
            torch.testing.assert_close(projected, found.embedding)


class Blind(torch.nn.Module):
    """An image tower that gives embeddings and nothing else."""

    image_size = 16

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3)) @ torch.ones(3, 16)


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({"token_wise": {}}, "terms.token_wise: this image tower gives no tokens"),
        ({"contrastive": {}, "simclr": {}}, "terms.simclr: this image tower gives no feature before its projection"),
    ],
)
def test_towers_without_tokens(monkeypatch: pytest.MonkeyPatch, terms: dict[str, Any], says: str) -> None:
    from declip.model import dual_encoder

    def build(model: Any) -> Any:
        clip = build_towers(model)
        clip.visual = Blind()
        return clip

    monkeypatch.setattr(dual_encoder, "build_towers", build)
    recipe = parse_recipe({"model": {"embed_dim": 16, "text": TEXT}, "terms": terms})
    with pytest.raises(InputError, match=says):
        DualEncoder(recipe)


# Hugging Face


def test_tokenizer_in_pieces(bert: Path) -> None:
    """Ids with start and end around them are what open_clip's own tokenizer gives."""
    tokenizer = HuggingFaceTokenizer(str(bert), vocabulary=31)
    assert (tokenizer.special.start, tokenizer.special.end, tokenizer.special.pad) == ((2,), (3,), 0)
    assert tokenizer.special.mask == 4
    texts = ["A red  cat", "a photo of a dog and a bird", "an unknown word"]
    ours = tokenize([tokenizer.encode(text) for text in texts], 12, tokenizer.special)
    theirs = open_clip.tokenizer.HFTokenizer(str(bert), context_length=12)(texts)
    assert torch.equal(torch.from_numpy(ours), theirs[:, : ours.shape[1]])
    short = tokenize([tokenizer.encode(texts[1])], 4, tokenizer.special)
    assert short.tolist() == [[2, *tokenizer.encode("a photo"), 3]]


def test_masked_with_its_own_mask_token(bert: Path) -> None:
    import pickle

    tokenizer = pickle.loads(pickle.dumps(HuggingFaceTokenizer(str(bert), vocabulary=31)))
    ids = [tokenizer.encode("a red green blue cat dog bird fish tree house cloud and number of some photo")] * 200
    tokens, labels = tokenize_masked(ids, 77, 0.5, np.random.default_rng(0), tokenizer.special)
    hidden = labels != -100
    assert not hidden[:, 0].any()
    assert hidden.mean() == pytest.approx(0.5 * 16 / 18, abs=0.03)
    assert (tokens[hidden] == 4).mean() == pytest.approx(0.8, abs=0.03)
    assert not (np.isin(tokens[:, 1:-1], [0, 2, 3])).any()  # never padding, start or end


def test_bert_looks_both_ways_and_equals_open_clip(bert: Path) -> None:
    model = {"embed_dim": 16, "text": {"hf_model_name": str(bert), "hf_proj_type": "linear"}}
    clip = build_towers(parse_recipe({"model": model}).model).eval()
    tokenizer = open_clip.tokenizer.HFTokenizer(str(bert), context_length=12)
    tokens = tokenizer(["a red cat", "a dog"])
    with torch.inference_mode():
        found = encode_text(clip, tokens)
        torch.testing.assert_close(found.embedding, clip.encode_text(tokens))
        torch.testing.assert_close(
            encode_text(clip, tokens[:, :5]).embedding, found.embedding
        )  # padding changes nothing
        changed = tokens.clone()
        changed[0, 3] = 10
        assert (encode_text(clip, changed).tokens[0, 1] - found.tokens[0, 1]).abs().max() > 1e-4  # it sees what comes
    facts = text_facts(clip)
    assert (facts.width, facts.vocabulary, facts.own_mask) == (32, 31, True)


@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_pooler"])
def test_captions_of_like_length_run_together(bert: Path, pooler: str) -> None:
    text = {"hf_model_name": str(bert), "hf_proj_type": "linear", "hf_pooler_type": pooler}
    clip = build_towers(parse_recipe({"model": {"embed_dim": 16, "text": text}}).model).eval()
    torch.manual_seed(0)
    tokens = torch.randint(5, 31, (2 * GROUP + 5, 12))
    lengths = torch.randint(1, 13, (len(tokens), 1))
    tokens = tokens.masked_fill(torch.arange(12) >= lengths, 0)
    last = clip.text.transformer.encoder.layer[-1].output.dense.weight
    found = [encode_text(clip, tokens, whole=whole) for whole in (False, True)]
    torch.testing.assert_close(found[0].embedding, found[1].embedding, rtol=1e-4, atol=1e-5)
    there = (torch.arange(12) < lengths)[..., None]
    torch.testing.assert_close(found[0].tokens * there, found[1].tokens * there, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(one.embedding.square().sum(), last)[0] for one in found)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    states = text_below(clip, 1, tokens)
    above = text_above(clip, 1, tokens, states)
    torch.testing.assert_close(above.embedding, found[1].embedding, rtol=1e-4, atol=1e-5)


def test_a_run_with_bert(bert: Path, tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    text = [f"model.text.hf_model_name={str(bert)!r}", "model.text.hf_proj_type=linear", "model.text.context_length=20"]
    recipe = tiny("declip", *text, "terms.masked_language.vocabulary=used")
    summary = declip.train(recipe, tmp_path / "run", quiet=True)
    assert summary["steps"] == 8
    model = declip.load(tmp_path / "run")
    clip = open_clip.create_model(f"local-dir:{tmp_path / 'run'}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'run'}")
    texts = ["a red cat", "a dog"]
    with torch.inference_mode():
        torch.testing.assert_close(clip.encode_text(tokenizer(texts), normalize=True), model.encode_text(texts))
    declip.train(recipe, tmp_path / "run", resume=True, quiet=True)


def test_token_wise_with_bert_and_timm(bert: Path, tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    text = [f"model.text.hf_model_name={str(bert)!r}", "model.text.hf_proj_type=linear", "model.text.context_length=20"]
    terms = ["terms.contrastive=none", "terms.token_wise.dim=8", "model.image.image_size=64"]
    recipe = tiny("clip", *text, *terms, "model.image.timm_model_name=resnet10t")
    assert declip.train(recipe, tmp_path / "run", quiet=True)["held_out_score"] is not None
    model = declip.load(tmp_path / "run")
    assert model.token_wise is not None
    assert model.encode_text(["a red cat"]).shape == (1, 20, 8)


def test_no_mask_token(bert: Path, tmp_path: Path) -> None:
    """A tokenizer without one, and a term that hides words."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(bert))
    tokenizer.mask_token = None
    for path in bert.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    model = {"embed_dim": 16, "text": {"hf_model_name": str(tmp_path), "hf_proj_type": "linear"}}
    DualEncoder(parse_recipe({"model": model}))
    with pytest.raises(InputError, match="has no mask token"):
        DualEncoder(parse_recipe({"model": model, "terms": {"contrastive": {}, "masked_language": {}}}))


def test_no_such_text_tower(tmp_path: Path) -> None:
    recipe = load_recipe("clip", [f"model.text.hf_model_name={str(tmp_path)!r}"])
    with pytest.raises(InputError, match="open_clip cannot build these towers"):
        DualEncoder(recipe)


def test_text_tower_that_looks_both_ways(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    """SigLIP's text tower: no causal mask, the last position pooled, so every caption comes at full length."""
    text = ["model.text.no_causal_mask=true", "model.text.pool_type=last"]
    recipe = tiny("declip", *text)
    model = DualEncoder(recipe)
    assert model.full_captions
    tokens = torch.randint(1, 400, (3, 77))
    torch.testing.assert_close(encode_text(model.clip, tokens).embedding, model.clip.encode_text(tokens))
    assert declip.train(recipe, tmp_path / "run", quiet=True)["steps"] == 8
    assert declip.load(tmp_path / "run").encode_text(["a cat"]).shape == (1, 16)
