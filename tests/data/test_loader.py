"""Batches: the same whatever makes them, with the views that a recipe asks for, and whole where pairs are broken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pair, write_pairs
from loading import MakeRecipe, assert_same, batches, captions_of, maker

from declip.data.batch import send
from declip.data.decode import decode_image
from declip.data.decoded import open_images
from declip.data.filters import draw_filter, no_filter
from declip.data.loader import BatchMaker, make_loader
from declip.data.sources import open_sources
from declip.data.tokenizer import MASK_ID, SOT, Tokenizer
from declip.errors import InputError


@pytest.mark.parametrize("workers", [1, 2])
def test_same_batches_whatever_the_workers(tiny: MakeRecipe, workers: int) -> None:
    recipe = tiny("declip")
    alone = batches(recipe)
    assert len(alone) == 12
    for made, expected in zip(batches(recipe, workers=workers), alone, strict=True):
        assert_same(made, expected)


def test_starts_at_any_batch(tiny: MakeRecipe) -> None:
    recipe = tiny("declip")
    whole = batches(recipe)
    for made, expected in zip(batches(recipe, first=7), whole[7:], strict=True):
        assert_same(made, expected)


def test_kept_and_freshly_decoded_images_give_the_same(tiny: MakeRecipe) -> None:
    assert maker(tiny("declip", "data.cache_gb=0")).images.kept is None
    for made, expected in zip(batches(tiny("declip", "data.cache_gb=0")), batches(tiny("declip")), strict=True):
        assert_same(made, expected)


def test_shares_of_mixed_pictures(tiny: MakeRecipe) -> None:
    """Drawn for each batch, the same again and on all ranks; the views themselves are as ever."""
    recipe = tiny("clip", "data.mix=0.3")
    shares = [batch.own_share for batch in batches(recipe)]
    assert shares == [batch.own_share for batch in batches(recipe, workers=1)]
    assert len(set(shares)) == len(shares)
    assert all(share is not None and 0 <= share <= 1 for share in shares)
    whole = maker(recipe)
    halves = [
        BatchMaker(whole.images, recipe, whole.size, whole.context_length, rank=rank, ranks=2) for rank in range(2)
    ]
    assert [half.make(3).own_share for half in halves] == [shares[3]] * 2
    plain = maker(tiny("clip")).make(3)
    assert plain.own_share is None
    assert torch.equal(whole.make(3).images, plain.images)


def test_filters_of_convolved_views(tiny: MakeRecipe) -> None:
    """Drawn for each view, the same again, on all ranks and wherever colours change; the views are as ever."""
    given = ["data.images.convolve=0.5", "data.images.jitter=0.8", "terms.contrastive.images=2"]
    recipe = tiny("clip", *given)
    made = batches(recipe)
    filters = torch.stack([batch.filters for batch in made if batch.filters is not None])
    assert filters.shape == (len(made), 2, 8, 3, 3, 5, 5)
    for batch, again in zip(batches(recipe, workers=1), made, strict=True):
        assert_same(batch, again)
    whole = maker(recipe)
    halves = [
        BatchMaker(whole.images, recipe, whole.size, whole.context_length, rank=rank, ranks=2).make(3).filters
        for rank in range(2)
    ]
    assert torch.equal(torch.cat([half for half in halves if half is not None], 1), filters[3])
    crops = maker(tiny("clip", *given, "data.augment_on=device")).make(3)
    assert crops.draws is not None
    assert crops.filters is not None
    assert torch.equal(crops.filters, filters[3])
    plain = maker(tiny("clip", *given[1:])).make(0)
    assert plain.filters is None
    assert torch.equal(plain.images, made[0].images)


def test_which_views_are_convolved(tiny: MakeRecipe) -> None:
    """Those that the recipe says, and no batch has filters where none is."""
    nothing = torch.from_numpy(no_filter())

    def changed(*overrides: str) -> list[float] | None:
        filters = maker(tiny("clip", *overrides)).make(0).filters
        return None if filters is None else (filters != nothing).flatten(2).any(2).float().mean(1).tolist()

    two = "terms.contrastive.images=2"
    assert changed(two) is None
    assert changed(two, "data.images.convolve=1.0") == [1, 1]
    assert changed(two, "data.second_images={convolve=1.0}") == [0, 1]
    assert changed("data.second_images={convolve=1.0}") is None
    assert changed("terms.simsiam.weight=1", "data.strong_images={convolve=1.0}") == [0, 1, 1]


def test_filters_are_drawn_as_described() -> None:
    """A share of the view itself, uniform, and the rest of a normal kernel of variance 1 over its numbers."""
    rng, own = np.random.default_rng(0), no_filter() > 0
    drawn = np.stack([draw_filter(rng) for _ in range(3000)])
    sides = np.array([1, 3, 5])[((drawn != 0).any((1, 2)).sum((1, 2))[:, None] > [1, 9]).sum(1)]
    for side in (1, 3, 5):
        kernels, first = drawn[sides == side], (5 - side) // 2
        assert 900 < len(kernels) < 1100
        within = np.zeros((5, 5), bool)
        within[first : first + side, first : first + side] = True
        assert not kernels[:, :, :, ~within].any()
        others = kernels[:, within & ~own]
        assert abs(others.mean()) < 0.02
        assert others.var() == pytest.approx(1 / 3 / (3 * side**2), rel=0.1)  # the mean of (1 - share)² is a third
        assert kernels[:, own].mean() == pytest.approx(0.5, abs=0.03)


def test_shapes(tiny: MakeRecipe) -> None:
    batch = maker(tiny("declip")).make(0)
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (2, 8, 16, 16, 3)
    assert batch.text_views == ("caption", "masked", "augmented")
    assert batch.tokens.shape[:2] == (3, 8)
    assert batch.labels is not None
    assert batch.labels.shape == batch.tokens.shape[1:]
    assert (batch.tokens[:, :, 0] == SOT).all()
    assert int((batch.tokens != 0).sum(-1).max()) == batch.tokens.shape[2]  # no longer than the longest caption
    assert len(set(batch.sample_ids.tolist())) == 8

    plain = maker(tiny("clip")).make(0)
    assert plain.images.shape == (1, 8, 16, 16, 3)
    assert (plain.text_views, plain.labels) == (("caption",), None)


def test_rows_belong_together(tiny: MakeRecipe) -> None:
    """With the whole image as the only view, each row is its pair's image, and its caption is one of its pair's."""
    recipe = tiny("clip", "data.images.crop_scale=[1.0, 1.0]", "data.images.crop_ratio=[1.2, 1.2]")
    made = maker(recipe)
    tokenizer = Tokenizer()
    batch = made.make(3)
    for row, sample in enumerate(batch.sample_ids.tolist()):
        whole = made.images.source[sample]
        mean = decode_image(whole.image).mean((0, 1))
        np.testing.assert_allclose(batch.images[0, row].float().mean((0, 1)), mean, atol=8)
        assert captions_of(batch, "caption")[row] in [tokenizer.encode(caption) for caption in whole.captions]


def test_views_differ_between_epochs(tiny: MakeRecipe) -> None:
    made = maker(tiny("clip", "data.images.crop_scale=[0.2, 0.9]"))
    seen: dict[int, list[Any]] = {}
    for number in range(15):
        batch = made.make(number)
        for row, sample in enumerate(batch.sample_ids.tolist()):
            seen.setdefault(sample, []).append(batch.images[0, row].numpy().tobytes())
    assert all(len(set(views)) == 3 for views in seen.values())


# Text views


def test_two_caption_views_are_two_captions(tiny: MakeRecipe) -> None:
    """Independent draws without replacement: with two captions and two views each view shows another one."""
    texts = 'terms.contrastive.texts=["caption", "masked"]'
    made = maker(tiny("clip", texts, "data.text.mask=0"))
    first_drawn = []
    for number in range(10):
        batch = made.make(number)
        captions, masked = captions_of(batch, "caption"), captions_of(batch, "masked")
        for sample, one, other in zip(batch.sample_ids.tolist(), captions, masked, strict=True):
            pool = [made.tokenizer.encode(caption) for caption in made.images.source.captions(sample)]
            assert sorted([one, other]) == sorted(pool)
            first_drawn.append(pool.index(one))
    assert 0.3 < np.mean(first_drawn) < 0.7


def test_dependent_views_show_one_caption(tiny: MakeRecipe) -> None:
    texts = 'terms.contrastive.texts=["caption", "masked"]'
    made = maker(tiny("clip", texts, "data.text.mask=0", "data.text.independent=false"))
    drawn = set()
    for number in range(5):
        batch = made.make(number)
        assert captions_of(batch, "caption") == captions_of(batch, "masked")
        for sample, ids in zip(batch.sample_ids.tolist(), captions_of(batch, "caption"), strict=True):
            pool = [made.tokenizer.encode(caption) for caption in made.images.source.captions(sample)]
            drawn.add(pool.index(ids))
    assert drawn == {0, 1}


def test_first_caption_only(tiny: MakeRecipe) -> None:
    made = maker(tiny("declip", "data.text.pool=first"))
    batch = made.make(1)
    firsts = [made.tokenizer.encode(made.images.source.captions(sample)[0]) for sample in batch.sample_ids.tolist()]
    assert captions_of(batch, "caption") == firsts


def test_masked_view_and_its_labels(tiny: MakeRecipe) -> None:
    made = maker(tiny("declip", "data.text.pool=first", "data.text.mask=0.5"))
    hidden = 0
    for number in range(5):
        batch = made.make(number)
        plain, masked = (batch.tokens[batch.text_views.index(view)] for view in ("caption", "masked"))
        assert batch.labels is not None
        chosen = batch.labels != -100
        torch.testing.assert_close(batch.labels[chosen], plain[:, : chosen.shape[1]][chosen])
        torch.testing.assert_close(masked[~chosen], plain[~chosen])
        hidden += int((masked == MASK_ID).sum())
        assert not (plain == MASK_ID).any()
    assert hidden > 20


def test_augmented_view_changes_words(tiny: MakeRecipe) -> None:
    made = maker(tiny("declip", "data.text.pool=first"))
    batch = made.make(0)
    pairs = zip(captions_of(batch, "caption"), captions_of(batch, "augmented"), strict=True)
    assert sum(one != other for one, other in pairs) >= 4


# Broken pairs


@pytest.fixture
def with_broken(tmp_path: Path) -> str:
    rows = [pair(number) for number in range(20)]
    rows[3]["image"] = b"no image"
    rows[4]["captions"] = [" ", ""]
    rows[5]["image"] = rows[5]["image"][:200]
    return f"data.train={str(write_pairs(tmp_path / 'broken.parquet', rows))!r}"


@pytest.mark.parametrize("cache_gb", [0, 1])
@pytest.mark.parametrize("workers", [0, 1])
def test_broken_pairs_are_replaced_and_reported(
    tiny: MakeRecipe, with_broken: str, cache_gb: int, workers: int
) -> None:
    recipe = tiny("clip", with_broken, f"data.cache_gb={cache_gb}", "schedule.batch_size=10")
    reported: dict[int, str] = {}
    for batch in batches(recipe, steps=2, workers=workers):  # an epoch
        assert batch.images.shape[1] == batch.tokens.shape[1] == 10
        assert not {3, 4, 5} & set(batch.sample_ids.tolist())
        assert len(set(batch.sample_ids.tolist())) == 10, "a stand-in that the batch has already is its own negative"
        reported |= {index: f"{where}: {reason}" for index, where, reason in batch.broken}
    assert reported.keys() == {3, 4, 5}
    assert re.search(r"broken\.parquet, row 3: the image cannot be decoded", reported[3])
    assert "caption" in reported[4]
    assert "row 5: the image cannot be decoded" in reported[5]


def test_stand_in_twice_where_there_is_no_other(tiny: MakeRecipe, with_broken: str) -> None:
    (batch,) = batches(tiny("clip", with_broken, "schedule.batch_size=20"), steps=1)
    assert set(batch.sample_ids.tolist()) == set(range(20)) - {3, 4, 5}


def test_too_many_broken_pairs(tiny: MakeRecipe, with_broken: str) -> None:
    recipe = tiny("clip", with_broken)
    assert maker(recipe, broken_limit=0.15).images.kept is not None
    with pytest.raises(InputError, match=r"3 of 20 pairs are broken, .* = 0\.1 allows; the first: .*row 3 \(key k3\)"):
        maker(recipe, broken_limit=0.1)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_can_be_read(tiny: MakeRecipe, tmp_path: Path, workers: int) -> None:
    """Found in a worker, it is still one sentence."""
    rows = [{**pair(number), "image": b"no image"} for number in range(10)]
    path = write_pairs(tmp_path / "broken.parquet", rows)
    recipe = tiny("clip", f"data.train={str(path)!r}", "data.cache_gb=0")
    # Sized from its headers, such a set would count as small: say that nothing is kept.
    made = maker(recipe)
    made.images.kept = None
    with pytest.raises(
        InputError, match=r"^None of the 10 pairs of \S+broken\.parquet can be read; the first: \S+, row \d: the image"
    ):
        list(make_loader(made, 0, 2, workers))


def test_self_supervised_views_are_made_in_their_own_way(tiny: MakeRecipe) -> None:
    """SLIP: the first view as ever, two more with flips; the first does not change because of them."""
    plain = maker(tiny("clip")).make(0)
    own = ["terms.simclr.weight=1", "data.strong_images.crop_scale=[1,1]", "data.strong_images.crop_ratio=[1,1]"]
    batch = maker(tiny("clip", *own, "data.strong_images.grayscale=1")).make(0)
    assert batch.images.shape[0] == 3
    assert torch.equal(batch.images[0], plain.images[0])
    colours = batch.images.float().std(dim=-1).mean(dim=(1, 2, 3))
    assert colours[0] > 1
    assert (colours[1:] < 0.5).all()  # grey


def test_captions_of_full_length(tiny: MakeRecipe) -> None:
    recipe = tiny("declip")
    source = open_sources(recipe.data.train, recipe.data)
    whole = BatchMaker(open_images(source, 1.0, 1.0), recipe, 16, 77, full_captions=True).make(0)
    cut = maker(recipe).make(0)
    assert whole.tokens.shape[2] == 77
    assert whole.labels is not None
    assert cut.labels is not None
    length = cut.tokens.shape[2]
    assert torch.equal(whole.tokens[:, :, :length], cut.tokens)
    assert (whole.tokens[:, :, length:] == 0).all()
    assert torch.equal(whole.labels[:, :length], cut.labels)
    assert (whole.labels[:, length:] == -100).all()


@pytest.mark.parametrize(("device", "waits"), [("cuda", False), ("mps", True)])
def test_copies_that_read_their_source_late_are_waited_for(device: str, waits: bool) -> None:
    asked = []

    class Copied(torch.Tensor):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            asked.append((args, kwargs))
            return self

    send(Copied(), torch.device(device))
    assert asked == [((torch.device(device),), {"non_blocking": not waits})]
