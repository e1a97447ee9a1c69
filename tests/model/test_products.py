"""oneDNN's products beside PyTorch's own: the same numbers, whatever the modules."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from declip.model import products
from declip.model.products import by_onednn, product

CPU = torch.device("cpu")

KINDS = products._kinds

pytestmark = pytest.mark.skipif(not products._is_there(), reason="oneDNN multiplies float32 on x86 only")


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken, also where MKL is faster."""
    monkeypatch.setattr(products, "_kinds", lambda: (torch.float32,))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what oneDNN multiplied, so that no test passes by doing without it."""
    shapes, linear = [], products._linear

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        shapes.append(x.shape)
        return linear(x, weight, bias)

    monkeypatch.setattr(products, "_linear", noted)
    return shapes


@torch.inference_mode()
def test_product(asked: list[torch.Size]) -> None:
    draw = torch.Generator().manual_seed(0)
    for n, k, m in ((1, 1, 1), (7, 33, 5), (300, 64, 129)):
        a, b = torch.randn(n, k, generator=draw), torch.randn(k, m, generator=draw)
        for left, right in (
            (a, b),
            (a.T.contiguous().T, b),
            (a, b.T.contiguous().T),
            (a[:, : k // 2 + 1], b[: k // 2 + 1]),
        ):
            torch.testing.assert_close(product(left, right), left @ right, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(product(a.double(), b.double()), a.double() @ b.double(), rtol=0, atol=0)
    assert len(asked) == 12
    assert product(torch.empty(0, 3), torch.empty(3, 2)).shape == (0, 2)


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_where_it_is_taken(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    KINDS.cache_clear()
    assert (torch.float32 in KINDS()) == (capability == "AVX512")
    KINDS.cache_clear()


def test_gradients() -> None:
    torch.manual_seed(0)
    layers, x = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 4)), torch.randn(3, 7, 20)
    layers(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in layers.parameters() if parameter.grad is not None]
    layers.zero_grad()
    with by_onednn(CPU):
        layers(x).square().sum().backward()
    assert len(expected) == 4
    for parameter, gradient in zip(layers.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["ViT-B-32", "timm", "text"])
def test_towers(name: str, no_grad: type[torch.no_grad], asked: list[torch.Size]) -> None:
    torch.manual_seed(0)
    vision: dict[str, Any] = {"image_size": 64, "patch_size": 16, "width": 96, "layers": 2, "head_width": 32}
    if name == "timm":
        vision = {
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_pool": "token",
            "timm_proj": "linear",
            "image_size": 224,
        }
    text = {"context_length": 12, "vocab_size": 100, "width": 64, "heads": 2, "layers": 2}
    side = vision["image_size"]
    clip = open_clip.CLIP(embed_dim=48, vision_cfg=vision, text_cfg=text).eval()
    encode = clip.encode_text if name == "text" else clip.encode_image
    given = torch.randint(100, (5, 12)) if name == "text" else torch.randn(3, 3, side, side)
    with no_grad():
        expected = encode(given)
        assert not asked
        with by_onednn(CPU):
            found, again = encode(given), encode(given)
    assert len(asked) >= 2 * 2 * 4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, found, rtol=0, atol=0)


@torch.inference_mode()
@pytest.mark.parametrize("weights", [False, True])
def test_attention(weights: bool, asked: list[torch.Size]) -> None:
    """By the fast kernel and without it, whose weights are asked or which has a mask."""
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x, mask = torch.randn(3, 6, 32), torch.ones(6, 6, dtype=torch.bool).triu(1)
    for masked in (None, mask):
        expected = attention(x, x, x, need_weights=weights, attn_mask=masked)
        with by_onednn(CPU):
            found = attention(x, x, x, need_weights=weights, attn_mask=masked)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)
        assert (found[1] is None) == (expected[1] is None)
    assert bool(asked) == (not weights)
