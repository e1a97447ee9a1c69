"""Which pairs and captions come in a batch: for any number of ranks, in turn, kept apart; processes that die."""

from __future__ import annotations

import multiprocessing.synchronize
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pair, write_pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loading import MakeRecipe, assert_same, captions_of, maker

from declip.data.loader import BatchMaker, make_loader
from declip.errors import InputError, RunStopped


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


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["data.text.pool=turn"],
        ["data.text.pool=each"],
        ["data.keep_apart=captions"],
        ['terms.contrastive.texts=["single","joined"]', "data.text.repeats=augmented"],
    ],
)
def test_tokens_without_pictures_are_those_of_the_batch(tiny: MakeRecipe, changes: list[str]) -> None:
    made = maker(tiny("declip", *changes))
    for number in (0, 7):
        assert torch.equal(torch.from_numpy(made.tokens(number)), made.make(number).tokens)


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


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked there alone")
def test_workers_share_no_lock_that_a_killed_one_keeps(tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """An Event's is held whenever a worker looks whether it is to end: killed just then, it would never be free."""

    def looked(_: object) -> bool:
        raise AssertionError("a lock is taken")

    monkeypatch.setattr(multiprocessing.synchronize.Event, "is_set", looked)
    loader = make_loader(maker(tiny("clip")), 0, 12, 2)
    assert len(list(loader)) == 12
    assert not multiprocessing.active_children()


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
