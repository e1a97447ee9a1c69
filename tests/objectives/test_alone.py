"""Terms in somebody else's loop: tensors in, a loss out, the same as in a recipe."""

from __future__ import annotations

import torch
from made import batch, features

from declip.objectives.masked_language import MaskedLanguage
from declip.objectives.nearest_neighbour import NearestNeighbour
from declip.objectives.simclr import SimCLR
from declip.objectives.simsiam import SimSiam


def test_neighbours() -> None:
    views = ["caption", "augmented"]
    one, other = (NearestNeighbour(8, 24, 2, views, random_start=False) for _ in range(2))
    for step in range(4):
        made, here = features(seed=step), batch([step, 5, 6, 7, 8])
        ours = one(made, here)
        alone = other.loss(made.unit_image, made.unit_texts(views), made.logit_scale, here.sample_ids)
        torch.testing.assert_close(ours, alone)
    torch.testing.assert_close(one.queue, other.queue)
    assert torch.equal(one.queue_ids, other.queue_ids)
    other.eval()
    before = other.queue.clone()
    other.loss(made.unit_image, made.unit_texts(views), made.logit_scale, here.sample_ids)
    assert torch.equal(other.queue, before)


def test_images_and_words() -> None:
    torch.manual_seed(0)
    made = features()
    simsiam = SimSiam(8, 16, 4).eval()
    torch.testing.assert_close(simsiam.loss(made.image[0], made.image[1]), simsiam(made, batch()))
    simclr = SimCLR(8, 16, 4, 0.1, (0, 1)).eval()
    assert simclr.loss(made.image[0], made.image[1]).item() > 0
    tokens, labels = torch.randn(5, 7, 6), torch.full((5, 7), -100)
    labels[1, 2] = labels[3, 4] = 9
    words = MaskedLanguage(6, 20)
    masked = features(text_tokens={"masked": tokens})
    torch.testing.assert_close(words.loss(tokens, labels), words(masked, batch(labels=labels)))
