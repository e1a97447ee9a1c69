"""Batches: the same whatever makes them, with the views that a recipe asks for, and whole where pairs are broken."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pair, write_pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from declip.data.batch import Batch, send
from declip.data.captions import EOT, MASK_ID, SOT, Tokenizer
from declip.data.decode import decode_image
from declip.data.decoded import open_images
from declip.data.loader import BatchMaker, make_loader
from declip.data.sources import open_sources
from declip.errors import InputError, RunStopped
from declip.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


def maker(recipe: Recipe, broken_limit: float = 1.0) -> BatchMaker:
    source = open_sources(recipe.data.train, recipe.data)
    return BatchMaker(open_images(source, recipe.data.cache_gb, broken_limit), recipe, 16, 77)


def batches(recipe: Recipe, first: int = 0, steps: int = 12, workers: int = 0) -> list[Batch]:
    return list(make_loader(maker(recipe), first, steps, workers))


def assert_same(one: Batch, other: Batch) -> None:
    assert one.text_views == other.text_views
    assert one.broken == other.broken
    for name in ("images", "tokens", "labels", "sample_ids"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)


def captions_of(batch: Batch, view: str) -> list[list[int]]:
    """The ids of each row without start, end and padding."""
    rows = batch.tokens[batch.text_views.index(view)].tolist()
    return [row[1 : row.index(EOT)] for row in rows]


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


# Which pairs, which captions


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_make_the_parts_of_the_same_batches(tiny: MakeRecipe, ranks: int) -> None:
    recipe = tiny("declip")
    images = maker(recipe).images
    parts = [BatchMaker(images, recipe, 16, 77, full_captions=True, rank=rank, ranks=ranks) for rank in range(ranks)]
    whole = BatchMaker(images, recipe, 16, 77, full_captions=True)
    for number in (0, 5):
        made = [part.make(number) for part in parts]
        expected = whole.make(number)
        assert torch.equal(torch.cat([part.images for part in made], 1), expected.images)
        assert torch.equal(torch.cat([part.tokens for part in made], 1), expected.tokens)
        assert torch.equal(torch.cat([part.sample_ids for part in made]), expected.sample_ids)


@pytest.mark.parametrize("ranks", [2, 5])
def test_stand_ins_are_the_same_for_any_number_of_ranks(tiny: MakeRecipe, tmp_path: Path, ranks: int) -> None:
    rows = [pair(number) for number in range(200)]
    for number in (3, 4, *range(10, 30), 60, 61):
        rows[number]["image"] = b"no image"
    named = f"data.train={str(write_pairs(tmp_path / 'broken.parquet', rows))!r}"
    recipe = tiny("clip", named, "schedule.batch_size=20")
    images = maker(recipe).images
    whole = BatchMaker(images, recipe, 16, 77)
    parts = [BatchMaker(images, recipe, 16, 77, rank=rank, ranks=ranks) for rank in range(ranks)]
    for number in range(6):
        ids = whole.make(number).sample_ids.tolist()
        assert len(set(ids)) == 20
        assert [sample for part in parts for sample in part.make(number).sample_ids.tolist()] == ids


def test_turns_of_a_mixture_and_of_few_pairs(tiny: MakeRecipe, tmp_path: Path) -> None:
    """A pair shows the next of its captions in the next epoch of its own source."""
    few = [pair(number) for number in range(100, 110)]
    names = [str(write_pairs(tmp_path / "few.parquet", few)), tiny("clip").data.train[0]]
    mixed = tiny("clip", f"data.train={names}", "data.weights=[1,1]", "data.text.pool=turn", "schedule.batch_size=10")
    alone = tiny("clip", f"data.train={names[:1]}", "data.text.pool=turn", "schedule.batch_size=6")
    for recipe, steps in ((mixed, 12), (alone, 8)):
        made = maker(recipe)
        shown: dict[int, list[int]] = {}
        for number in range(steps):
            batch = made.make(number)
            epochs = made.order.epochs(number).tolist()
            for sample, ids, epoch in zip(
                batch.sample_ids.tolist(), captions_of(batch, "caption"), epochs, strict=True
            ):
                pool = made.images.source.captions(sample)
                assert ids == made.tokenizer.encode(pool[epoch % len(pool)])
                shown.setdefault(sample, []).append(epoch)
        assert all(epochs == sorted(set(epochs)) for sample, epochs in shown.items() if sample < 10)
        assert max(epoch for epochs in shown.values() for epoch in epochs) >= 5


def test_captions_in_turn(tiny: MakeRecipe) -> None:
    made = maker(tiny("clip", "data.text.pool=turn"))
    size = len(made.images.source)
    shown: dict[int, list[int]] = {}
    for number in range(2 * size // 8):
        batch = made.make(number)
        for sample, ids in zip(batch.sample_ids.tolist(), captions_of(batch, "caption"), strict=True):
            pool = [made.tokenizer.encode(caption) for caption in made.images.source.captions(sample)]
            shown.setdefault(sample, []).append(pool.index(ids))
    assert all(turns == [0, 1] for turns in shown.values() if len(turns) == 2)
    assert len(shown) == size


def test_each_caption_is_a_pair(tiny: MakeRecipe) -> None:
    made = maker(tiny("clip", "data.text.pool=each"))
    pairs = len(made.images.source)
    assert made.items == 2 * pairs
    seen: list[tuple[int, tuple[int, ...]]] = []
    for number in range(made.items // 8):
        batch = made.make(number)
        seen += zip(batch.sample_ids.tolist(), map(tuple, captions_of(batch, "caption")), strict=True)
    assert len(set(seen)) == len(seen) == 2 * pairs // 8 * 8


def test_images_with_several_captions_kept_apart(tiny: MakeRecipe) -> None:
    made = maker(tiny("clip", "data.text.pool=each", "data.keep_apart=images"))
    doubled = sum(len(set(made.make(number).sample_ids.tolist())) < 8 for number in range(10))
    plain = maker(tiny("clip", "data.text.pool=each"))
    assert doubled < sum(len(set(plain.make(number).sample_ids.tolist())) < 8 for number in range(10))


@pytest.fixture
def with_equals(tmp_path: Path) -> str:
    """Forty pairs, each caption four times and each picture twice."""
    rows = [{**pair(number % 20), "key": str(number), "captions": [f"thing {number % 10}"]} for number in range(40)]
    return f"data.train={str(write_pairs(tmp_path / 'equals.parquet', rows))!r}"


@pytest.mark.parametrize(("what", "classes"), [("captions", 10), ("images", 20)])
def test_equals_kept_apart(tiny: MakeRecipe, with_equals: str, what: str, classes: int) -> None:
    def doubled(*overrides: str) -> int:
        made = maker(tiny("clip", with_equals, "schedule.batch_size=8", *overrides))
        batches = [made.make(number).sample_ids % classes for number in range(16)]
        return sum(len(set(batch.tolist())) < 8 for batch in batches)

    assert doubled() > 8
    # Ten captions in batches of eight leave little choice at the end of a block.
    assert doubled(f"data.keep_apart={what}") <= 4


def test_equal_captions_have_equal_ids(tiny: MakeRecipe, with_equals: str) -> None:
    made = maker(tiny("clip", with_equals, "terms.contrastive.equal_captions=positives"))
    batch = made.make(0)
    assert batch.caption_ids is not None
    classes = batch.sample_ids % 10
    assert torch.equal(batch.caption_ids[0][:, None] == batch.caption_ids[0], classes[:, None] == classes)
    assert maker(tiny("clip", with_equals)).make(0).caption_ids is None


def test_weights_mix_sources(tiny: MakeRecipe, tmp_path: Path) -> None:
    paths = [
        str(write_pairs(tmp_path / f"{name}.parquet", [pair(number) for number in range(count)]))
        for name, count in (("few", 10), ("many", 60))
    ]
    recipe = tiny("clip", f"data.train={paths}", "data.weights=[1, 1]")
    made = maker(recipe)
    few = sum(int((made.make(number).sample_ids < 10).sum()) for number in range(10))
    assert few == 40
    with pytest.raises(InputError, match=r"data\.weights needs several sources"):
        maker(tiny("clip", f"data.train={paths[:1]}", "data.weights=[1]"))


def test_a_killed_worker_is_said_and_does_not_hang(tiny: MakeRecipe) -> None:
    recipe = tiny("clip")
    made = maker(recipe)
    loader = make_loader(made, 0, 10_000, 1)
    next(loader)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RunStopped, match=r"^A loader process has died: .*lower data\.workers"):
        for _ in loader:
            pass


@pytest.mark.parametrize("raised", [EOFError(), ConnectionResetError(104, "reset"), FileNotFoundError(2, "no socket")])
def test_a_worker_killed_while_its_batch_is_fetched(
    tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    def fetch(_: Any) -> Any:
        raise raised

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_next_data", fetch)
    with pytest.raises(RunStopped, match=r"^A loader process has died: "):
        next(make_loader(maker(tiny("clip")), 0, 2, 1))


def test_what_a_worker_raises_is_no_death(tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise FileNotFoundError("a bug in a worker")

    monkeypatch.setattr(BatchMaker, "make", fail)
    with pytest.raises(FileNotFoundError, match="a bug in a worker"):
        next(make_loader(maker(tiny("clip")), 0, 2, 1))


@given(data=st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_killed_and_resumed_anywhere_with_other_workers(tiny: MakeRecipe, data: st.DataObject) -> None:
    """At fifty random positions: the loader ends there, another one with other workers and ranks goes on."""
    recipe = tiny("declip")
    made = maker(recipe)
    position = data.draw(st.integers(0, 200))
    before = make_loader(made, max(0, position - 2), 400, data.draw(st.sampled_from([0, 0, 1])))
    next(before)
    before.close()
    after = make_loader(maker(recipe), position, 400, data.draw(st.sampled_from([0, 0, 0, 1, 2])))
    for number in range(position, position + 2):
        assert_same(next(after), made.make(number))
    after.close()
