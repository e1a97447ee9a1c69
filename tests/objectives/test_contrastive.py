"""InfoNCE over views against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from made import batch, cosine, features
from torch.nn import functional as F

from declip.model.dual_encoder import Features
from declip.objectives import contrastive
from declip.objectives.contrastive import Contrastive, mean_of_equals, multi_view_infonce


def naive(made: Features, images: int, texts: list[str]) -> float:
    """Every image view with every text view: the mean of two cross-entropies, each a softmax of its own."""
    scale, losses = float(made.logit_scale.detach()), []
    for image in made.image[:images]:
        for view in texts:
            text, count = made.text[view], len(image)
            logits = [[scale * cosine(image[i], text[j]) for j in range(count)] for i in range(count)]
            for i in range(count):
                losses.append(math.log(sum(math.exp(logits[i][j] - logits[i][i]) for j in range(count))))
                losses.append(math.log(sum(math.exp(logits[j][i] - logits[i][i]) for j in range(count))))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("images", "texts"),
    [(1, ["caption"]), (2, ["caption", "augmented"]), (2, ["masked"]), (1, ["augmented", "masked"])],
)
def test_like_naive(images: int, texts: list[str]) -> None:
    made = features()
    loss = Contrastive(images, texts)(made, batch())
    assert loss.shape == ()
    assert loss.item() == pytest.approx(naive(made, images, texts), rel=1e-5)


def test_equal_captions_are_positives() -> None:
    """Against loops: each row's target is spread over the rows that show its caption."""
    made = features(images=2, views=["caption", "masked"])
    ids = [[7, 3, 7, 7, 4], [1, 2, 3, 4, 2]]
    shown = replace(batch(), text_views=("masked", "caption"), caption_ids=torch.tensor(ids[::-1]))
    scale, losses = float(made.logit_scale.detach()), []
    for image in made.image:
        for view, own in zip(("caption", "masked"), ids, strict=True):
            text = made.text[view]
            logits = [[scale * cosine(i, t) for t in text] for i in image]
            for rows in (logits, list(zip(*logits, strict=True))):
                for i, row in enumerate(rows):
                    shares = [math.exp(x) / sum(map(math.exp, row)) for x in row]
                    positives = [j for j in range(5) if own[j] == own[i]]
                    losses.append(-sum(math.log(shares[j]) for j in positives) / len(positives))
    loss = Contrastive(2, ["caption", "masked"], equal_positives=True)(made, shown)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("whole", [2**19, 1])
def test_a_mixed_picture_belongs_to_both_captions(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against loops, from whole matrices and in chunks; with equal captions each share is spread over those."""
    monkeypatch.setattr(contrastive, "WHOLE", whole)
    made = features(images=2, views=["caption"], batch=6)
    ids, share = [7, 3, 7, 7, 4, 3], 0.7
    scale, text = float(made.logit_scale.detach()), made.text["caption"]
    for equal in (False, True):
        alike = [[float(ids[i] == ids[j] if equal else i == j) for j in range(6)] for i in range(6)]
        spread = [[value / sum(row) for value in row] for row in alike]
        target = [[share * spread[i][j] + (1 - share) * spread[i ^ 1][j] for j in range(6)] for i in range(6)]
        losses = []
        for image in made.image:
            logits = [[scale * cosine(i, t) for t in text] for i in image]
            for rows, wanted in ((logits, target), (list(zip(*logits, strict=True)), list(zip(*target, strict=True)))):
                for row, own in zip(rows, wanted, strict=True):
                    total = sum(map(math.exp, row))
                    losses.append(-sum(w * math.log(math.exp(x) / total) for x, w in zip(row, own, strict=True)))
        shown = replace(
            batch(range(6)),
            text_views=("caption",),
            caption_ids=torch.tensor([ids]) if equal else None,
            own_share=share,
        )
        loss = Contrastive(2, ["caption"], equal_positives=equal)(made, shown)
        assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_different_captions_are_as_ever() -> None:
    made, ids = features(), torch.arange(5)[None].repeat(3, 1)
    shown = replace(batch(), text_views=("caption", "masked", "augmented"), caption_ids=ids)
    losses = [Contrastive(2, ["caption", "masked"], equal_positives=equal)(made, shown) for equal in (False, True)]
    torch.testing.assert_close(losses[1], losses[0])
    vectors = torch.randn(3, 5, 4)
    assert torch.equal(mean_of_equals(vectors, ids), vectors)


def test_only_the_named_views_get_gradients() -> None:
    made = features()
    Contrastive(1, ["augmented"])(made, batch()).backward()
    assert made.image.grad is not None
    assert made.image.grad[0].abs().sum() > 0
    assert made.image.grad[1].abs().sum() == 0
    assert made.text["augmented"].grad is not None
    assert made.text["caption"].grad is None
    assert made.logit_scale.grad is not None


def test_gradient_like_cross_entropy() -> None:
    """One view of each is CLIP's loss as open_clip computes it."""
    made, same = features(images=1), features(images=1)
    Contrastive(1, ["caption"])(made, batch()).backward()
    image, text = F.normalize(same.image[0], dim=-1), F.normalize(same.text["caption"], dim=-1)
    logits = same.logit_scale * image @ text.T
    target = torch.arange(5)
    ((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2).backward()
    torch.testing.assert_close(made.image.grad, same.image.grad)
    torch.testing.assert_close(made.text["caption"].grad, same.text["caption"].grad)
    torch.testing.assert_close(made.logit_scale.grad, same.logit_scale.grad)


def test_large_scales_do_not_overflow() -> None:
    images = F.normalize(torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    assert multi_view_infonce(images, images, torch.tensor(1e4)).item() == pytest.approx(0, abs=1e-6)
    swapped = multi_view_infonce(images, images.roll(1, dims=1), torch.tensor(1e4))
    assert 100 < swapped.item() < 2e4


def test_alike_pairs_cost_the_logarithm_of_the_batch() -> None:
    same = F.normalize(torch.ones(2, 6, 3), dim=-1)
    assert multi_view_infonce(same, same, torch.tensor(50.0)).item() == pytest.approx(math.log(6))
