"""The towers, and the text tower's forward on captions of any length against open_clip's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from declip.architecture import Model
from declip.data.captions import tokenize
from declip.data.tokenizer import MASK_ID, Tokenizer
from declip.errors import InputError
from declip.model.dual_encoder import DualEncoder
from declip.model.image_tower import encode_image
from declip.model.text_tower import GROUP, encode_text, trim
from declip.model.towers import build_towers
from declip.recipe import parse_recipe

TOWERS: dict[str, Any] = {
    "embed_dim": 24,
    "image": {"image_size": 16, "layers": 1, "width": 32, "head_width": 32, "patch_size": 8},
    "text": {"context_length": 77, "layers": 2, "width": 32, "heads": 2},
}


def towers(**changes: Any) -> Model:
    return parse_recipe({"model": TOWERS | changes}).model


def captions(count: int) -> list[str]:
    """Of 0 to 99 words, the longest cut."""
    return [" ".join(f"word{word % 7}" for word in range(length)) for length in (i * 37 % 100 for i in range(count))]


def trimmed(texts: list[str]) -> Tensor:
    tokenizer = Tokenizer()
    return torch.from_numpy(tokenize([tokenizer.encode(text) for text in texts], 77))


def padded(tokens: Tensor) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, 77 - tokens.shape[1]))


@pytest.mark.parametrize("count", [3, 2 * GROUP + 5])  # at once, and in groups of like length
@pytest.mark.parametrize("words", [6, 99])
def test_trimmed_and_grouped_text_is_open_clips(count: int, words: int) -> None:
    torch.manual_seed(0)
    clip = build_towers(towers())
    tokens = trimmed([" ".join(text.split()[:words]) for text in captions(count)])
    assert (tokens.shape[1] < 77) == (words == 6)
    weights = torch.randn(count, 24)

    gradients = []
    for encode in (lambda: encode_text(clip, tokens)[0], lambda: clip.encode_text(padded(tokens))):
        clip.zero_grad()
        embeddings = encode()
        (embeddings * weights).sum().backward()
        text_parameters = {name: p.grad for name, p in clip.named_parameters() if "visual" not in name}
        gradients.append({name: grad.clone() for name, grad in text_parameters.items() if grad is not None})
        gradients[-1]["embeddings"] = embeddings.detach()
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 20
    for name, ours in gradients[0].items():
        torch.testing.assert_close(
            ours, gradients[1][name], rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_final_tokens_are_those_of_each_caption_alone() -> None:
    torch.manual_seed(0)
    clip = build_towers(towers())
    tokens = trimmed(captions(GROUP + 10))
    final = encode_text(clip, tokens).tokens
    assert final.shape == (*tokens.shape, 32)
    for row in (0, 1, 17, GROUP + 9):
        length = int((tokens[row] != 0).sum())
        alone = encode_text(clip, tokens[row : row + 1, :length]).tokens
        torch.testing.assert_close(final[row, :length], alone[0], rtol=1e-4, atol=1e-5)


def test_mask_embedding_stands_for_the_mask_token() -> None:
    """As if the vocabulary had one row more; the caption still ends at its end token, whose id is lower."""
    torch.manual_seed(0)
    clip = build_towers(towers())
    tokens = trimmed(["a red cat", "a green dog on a tree"])
    tokens[0, 2] = tokens[1, 4] = MASK_ID
    mask = torch.randn(32, requires_grad=True)
    found = encode_text(clip, tokens, mask).embedding
    with torch.no_grad():
        clip.token_embedding.weight[5] = mask
    as_plain = encode_text(clip, tokens.masked_fill(tokens == MASK_ID, 5)).embedding
    torch.testing.assert_close(found, as_plain)
    found.sum().backward()
    assert mask.grad is not None
    assert mask.grad.abs().sum() > 0
    assert clip.token_embedding.weight.grad[0].abs().sum() == 0  # padding's row stands in where the mask is


@pytest.mark.parametrize("text", [{}, {"proj_bias": True}])
def test_projection_with_and_without_bias(text: dict[str, Any]) -> None:
    torch.manual_seed(0)
    clip = build_towers(towers(text=TOWERS["text"] | text)).eval()
    tokens = trimmed(captions(4))
    torch.testing.assert_close(encode_text(clip, tokens)[0], clip.encode_text(padded(tokens)), rtol=1e-4, atol=1e-5)


def test_frozen_patch_embedding_and_patch_dropout() -> None:
    clip = build_towers(towers(freeze_patch_embedding=True, patch_dropout=0.5))
    assert not clip.visual.conv1.weight.requires_grad
    assert clip.visual.patch_dropout.prob == 0.5
    assert build_towers(towers()).visual.conv1.weight.requires_grad


def test_logit_scale_starts_and_stays() -> None:
    recipe = parse_recipe({"model": TOWERS | {"logit_scale_init": 1.5, "logit_scale_range": [0.0, 2.0]}})
    model = DualEncoder(recipe)
    assert model.clip.logit_scale.item() == pytest.approx(1.5)
    for value, kept in ((5.0, 2.0), (-1.0, 0.0), (1.0, 1.0)):
        model.clip.logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        assert model.clip.logit_scale.item() == kept


@pytest.mark.parametrize("image_size", [32, 96])
def test_resnet_pooled_with_one_query_is_open_clips(image_size: int) -> None:
    torch.manual_seed(0)
    image = {"image_size": image_size, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
    clip = build_towers(towers(image=image))
    for parameter in clip.visual.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)  # biases start at 0, and a block's last norm hides the block
    pixels, weights = torch.randn(6, 3, image_size, image_size), torch.randn(6, 24)

    found = []
    for encode in (lambda: encode_image(clip, pixels).embedding, lambda: clip.encode_image(pixels)):
        clip.zero_grad()
        embeddings = encode()
        (embeddings * weights).sum().backward()
        gradients = {name: p.grad.clone() for name, p in clip.visual.named_parameters() if p.grad is not None}
        found.append(gradients | {"embeddings": embeddings.detach()})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == len(list(clip.visual.parameters())) + 1
    for name, ours in found[0].items():
        distance = (ours - found[1][name]).norm() / found[1][name].norm().clamp(min=1)
        assert distance < 1e-4, name


def test_resnet_and_named_architectures() -> None:
    clip = build_towers(towers(image={"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}))
    assert clip.visual(torch.zeros(2, 3, 32, 32)).shape == (2, 24)
    with pytest.raises(InputError, match=r"model\.name = 'ViT-Z'"):
        build_towers(towers(name="ViT-Z"))
    with pytest.raises(InputError, match="has a caption decoder"):
        build_towers(towers(name="coca_ViT-B-32"))


@pytest.mark.parametrize(
    "changes",
    [
        {"text": TOWERS["text"] | {"heads": 3}},
        {"image": TOWERS["image"] | {"head_width": 64}},
        {"image": TOWERS["image"] | {"no_such_field": 1}},
    ],
)
def test_impossible_towers(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^model: open_clip cannot build these towers: "):
        build_towers(towers(**changes))


def test_image_smaller_than_a_patch() -> None:
    with pytest.raises(InputError, match="images of 4 px are smaller than a patch of 8 px"):
        build_towers(towers(image=TOWERS["image"] | {"image_size": 4}))


def test_another_vocabulary_is_read_at_its_end_token() -> None:
    """The largest id of a caption, wherever it stands in the vocabulary."""
    torch.manual_seed(0)
    clip = build_towers(towers(text=TOWERS["text"] | {"vocab_size": 50_000})).eval()
    tokens = trimmed(["a red heart", "dog"])
    found = encode_text(clip, tokens).embedding
    torch.testing.assert_close(found, clip.encode_text(padded(tokens)), rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("count", [2, GROUP + 3])
def test_a_word_of_id_0_is_no_padding(count: int) -> None:
    """In "heart!;" the exclamation mark is token 0."""
    torch.manual_seed(0)
    clip = build_towers(towers()).eval()
    tokens = trimmed([f"a red heart!; number {number}" if number % 2 else "heart !; !;" for number in range(count)])
    assert (tokens[:, 1:4] == 0).any()
    cut = trim(padded(tokens))
    assert cut.shape == tokens.shape
    torch.testing.assert_close(encode_text(clip, cut).embedding, clip.encode_text(padded(tokens)), rtol=1e-4, atol=1e-5)


def test_padding_with_the_end_token() -> None:
    """As Hugging Face's tokenizer of CLIP pads: the first end token is the one that counts."""
    torch.manual_seed(0)
    clip = build_towers(towers()).eval()
    tokens = padded(trimmed(["a red heart", "a dog"]))
    expected = clip.encode_text(tokens)
    padded_so = tokens.masked_fill(tokens == 0, 49407)
    found = encode_text(clip, trim(padded_so, 49407)).embedding
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"text": TOWERS["text"] | {"vocab_size": 1000}},
            "model.text.vocab_size = 1000 is below the tokenizer's 49408",
        ),
        ({"text": TOWERS["text"] | {"embed_cls": True}}, "model.text.embed_cls"),
        (
            {"image": {"timm_model_name": "vit_tiny_patch16_224", "image_size": 8}},
            "open_clip cannot build these towers",
        ),
        (
            {"image": {"timm_model_name": "resnet10t", "image_size": 32}, "freeze_patch_embedding": True},
            "only open_clip's own ViT",
        ),
    ],
)
def test_towers_that_cannot_be_trained(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        DualEncoder(parse_recipe({"model": TOWERS | changes}))
