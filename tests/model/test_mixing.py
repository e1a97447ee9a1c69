"""Mixed pictures: each with its partner, of all views, before the tower sees them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loading import MakeRecipe, maker

from declip.model.dual_encoder import DualEncoder
from declip.model.image_tower import encode_image
from declip.model.mixing import mixed, of_partners


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
