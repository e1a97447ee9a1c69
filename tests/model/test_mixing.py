"""Mixed pictures: each with its partner or a convolution of itself, of all views, before the tower sees them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loading import MakeRecipe, maker

from declip.data import device_views
from declip.data.filters import no_filter
from declip.model.dual_encoder import DualEncoder
from declip.model.image_tower import encode_image
from declip.model.mixing import convolved, mixed, of_partners


def test_partners() -> None:
    rows = torch.arange(6)
    assert of_partners(rows).tolist() == [1, 0, 3, 2, 5, 4]
    assert torch.equal(of_partners(of_partners(rows)), rows)
    views = torch.stack([rows, rows + 10])
    assert of_partners(views, dim=1).tolist() == [[1, 0, 3, 2, 5, 4], [11, 10, 13, 12, 15, 14]]
    assert mixed(views, 0.75)[1].tolist() == [10.25, 10.75, 12.25, 12.75, 14.25, 14.75]


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_towers_see_mixed_pixels(micro_batch: int | None, tiny: MakeRecipe) -> None:
    given = ["data.mix=0.5", "terms.contrastive.images=2", f"engine.micro_batch={micro_batch or 'none'}"]
    recipe = tiny("clip", *given)
    torch.manual_seed(0)
    model, batch = DualEncoder(recipe), replace(maker(recipe).make(0), own_share=0.7)
    found = model(batch).image
    for view, embedded in zip(batch.images, found, strict=True):
        pixels = model.pixels(view)
        expected = encode_image(model.clip, 0.7 * pixels + 0.3 * pixels[[1, 0, 3, 2, 5, 4, 7, 6]]).embedding
        torch.testing.assert_close(embedded, expected, rtol=1e-4, atol=1e-5)
    plain = model(replace(batch, own_share=None)).image
    assert not torch.allclose(plain, found)
    torch.testing.assert_close(model(replace(batch, own_share=1.0)).image, plain)


@pytest.mark.parametrize("pixels", [2**23, 48], ids=["whole", "in parts"])
def test_a_convolution_is_its_sum(pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a loop over pixels: the cross-correlation that the field calls convolution, zeros around."""
    monkeypatch.setattr(device_views, "_PIXELS_AT_A_TIME", pixels)
    torch.manual_seed(0)
    images, filters = torch.randn(2, 3, 4, 6, 3), torch.randn(2, 3, 3, 3, 5, 5)
    found = convolved(images, filters)
    assert found.shape == images.shape
    for view, row, top, left in [(0, 0, 0, 0), (1, 2, 3, 5), (0, 1, 2, 3)]:
        expected = torch.zeros(3)
        for down in range(-2, 3):
            for across in range(-2, 3):
                if 0 <= top + down < 4 and 0 <= left + across < 6:
                    pixel = images[view, row, top + down, left + across]
                    expected += filters[view, row, :, :, down + 2, across + 2] @ pixel
        torch.testing.assert_close(found[view, row, top, left], expected, rtol=1e-4, atol=1e-5)
    nothing = torch.from_numpy(no_filter()).expand(2, 3, -1, -1, -1, -1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(convolved(images, nothing), images)


@pytest.mark.parametrize("more", [[], ["engine.micro_batch=3"], ["model.views_apart=true"]], ids=str)
def test_towers_see_convolved_pixels(more: list[str], tiny: MakeRecipe) -> None:
    recipe = tiny("clip", "data.images.convolve=0.5", "terms.contrastive.images=2", *more)
    torch.manual_seed(0)
    model, batch = DualEncoder(recipe), maker(recipe).make(0)
    assert batch.filters is not None
    found = model(batch).image
    pixels = convolved(torch.stack([model.pixels(view).permute(0, 2, 3, 1) for view in batch.images]), batch.filters)
    for view, embedded in zip(pixels, found, strict=True):
        torch.testing.assert_close(
            embedded, encode_image(model.clip, view.permute(0, 3, 1, 2)).embedding, rtol=1e-4, atol=1e-5
        )
    plain = model(replace(batch, filters=None)).image
    assert not torch.allclose(plain, found)
    torch.testing.assert_close(model(batch.part(1, ["caption"])).image, found[:1], rtol=1e-4, atol=1e-5)
    partners = replace(batch, own_share=0.7)
    expected = mixed(pixels, 0.7)[1].permute(0, 3, 1, 2)
    torch.testing.assert_close(
        model(partners).image[1], encode_image(model.clip, expected).embedding, rtol=1e-4, atol=1e-5
    )
