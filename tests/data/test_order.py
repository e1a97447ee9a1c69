"""Which pair comes when."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip.data import order as module
from declip.data.order import Mixture, Order
from declip.errors import InputError


def epoch(order: Order, number: int) -> np.ndarray:
    """The pairs of an epoch."""
    return order.at(np.arange(number * order.epoch_length, (number + 1) * order.epoch_length))


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    order = Order(size=24, batch_size=4, seed=3)
    epochs = [epoch(order, number).tolist() for number in range(5)]
    for pairs in epochs:
        assert sorted(pairs) == list(range(24))
    assert len({tuple(pairs) for pairs in epochs}) == 5


def test_no_batch_holds_a_pair_twice() -> None:
    order = Order(size=11, batch_size=4, seed=0)
    for number in range(100):
        batch = order.batch(number)
        assert batch.shape == (4,)
        assert len(set(batch.tolist())) == 4
        assert 0 <= batch.min() <= batch.max() < 11


def test_remainder_is_another_one_in_every_epoch() -> None:
    order = Order(size=11, batch_size=4, seed=0)
    assert order.epoch_length == 8
    left_out = [frozenset(range(11)) - set(epoch(order, number).tolist()) for number in range(30)]
    assert all(len(pairs) == 3 for pairs in left_out)
    assert len(set(left_out)) > 20
    assert frozenset().union(*left_out) == frozenset(range(11))


def test_a_pure_function_of_seed_and_position() -> None:
    forwards = [Order(10, 3, seed=5).batch(number).tolist() for number in range(40)]
    order = Order(10, 3, seed=5)
    assert [order.batch(number).tolist() for number in reversed(range(40))] == forwards[::-1]
    assert [Order(10, 3, seed=6).batch(number).tolist() for number in range(40)] != forwards


def test_order_is_the_same_everywhere() -> None:
    """A run that is resumed elsewhere, or after an update, must go on in the same order."""
    assert Order(10, 4, seed=1).batch(5).tolist() == [9, 1, 4, 3]


def test_batch_of_the_whole_set_and_no_larger() -> None:
    assert sorted(Order(5, 5, seed=0).batch(7).tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="6 is larger than the set of 5"):
        Order(5, 6, seed=0)


@st.composite
def sharded(draw: st.DrawFn) -> Order:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    shards = np.concatenate([[0], np.cumsum(sizes)])
    size = int(shards[-1])
    batch_size = draw(st.integers(1, min(size, 30)))
    return Order(size, batch_size, draw(st.integers(0, 99)), shards, draw(st.integers(1, 100)))


@given(sharded())
@settings(max_examples=60, deadline=None)
def test_every_pair_once_an_epoch_and_never_twice_a_batch(order: Order) -> None:
    """Whatever the shards and the window; the batches are the epochs' pairs one after the other."""
    batches = [order.batch(number).tolist() for number in range(4 * order.size // order.batch_size)]
    assert all(len(set(batch)) == order.batch_size for batch in batches)
    stream = [pair for batch in batches for pair in batch]
    for start in range(0, len(stream) - order.epoch_length + 1, order.epoch_length):
        pairs = stream[start : start + order.epoch_length]
        assert len(set(pairs)) == len(pairs)
        assert set(pairs) <= set(range(order.size))
    assert order.epoch_length == order.size or order.size < 4 * order.batch_size


@given(st.integers(1, 5000), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_computed_permutation_is_one(size: int, seed: int) -> None:
    assert sorted(module._computed(np.arange(size), size, (seed, 1, 2)).tolist()) == list(range(size))


def test_computed_and_listed_permutations_shuffle_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither stays near storage order, nor keeps neighbours together."""
    for listed in (2**20, 0):
        monkeypatch.setattr(module, "_LISTED", listed)
        pairs = epoch(Order(50_000, 10, seed=4), 1)
        assert abs(np.corrcoef(pairs, np.arange(50_000))[0, 1]) < 0.02
        assert (np.abs(np.diff(pairs)) < 10).mean() < 0.002


@pytest.mark.parametrize(("shards", "length"), [(100, 1000), (1000, 200), (30, 5000)])
def test_shards_are_read_together_and_shuffled_well(shards: int, length: int) -> None:
    """Rank correlation with storage order below 0.02, and no more shards open at a time than fit in the window."""
    window = 10_000
    order = Order(shards * length, 100, 0, np.arange(shards + 1) * length, window)
    for number in range(3):
        pairs = epoch(order, number)
        assert abs(np.corrcoef(pairs, np.arange(len(pairs)))[0, 1]) < 0.02
        open_at_a_time = [len(set((pairs[i : i + 100] // length).tolist())) for i in range(0, len(pairs), 5000)]
        assert max(open_at_a_time) <= 2 * (window // length + 1)


def test_a_hundred_million_pairs_need_no_list() -> None:
    order = Order(100_000_000, 256, seed=0)
    batches = np.concatenate([order.batch(number) for number in (0, 200_000, 390_625, 10**9)])
    assert len(set(batches.tolist())) == 4 * 256
    assert batches.max() > 99_000_000
    assert pickle.loads(pickle.dumps(order)).batch(7).tolist() == order.batch(7).tolist()


# Mixtures


def test_mixture_follows_its_weights() -> None:
    mixture = Mixture([Order(size, 20, size, doubles=True) for size in (50, 1000, 70)], [1, 3, 1.5], seed=0)
    batches = np.stack([mixture.batch(number) for number in range(550)])
    which = np.searchsorted([50, 1050, 1120], batches, side="right")
    shares = np.stack([(which == source).sum(1) for source in range(3)], 1)
    assert shares.sum(0).tolist() == [2000, 6000, 3000]
    assert (np.abs(shares - np.array([1, 3, 1.5]) / 5.5 * 20) < 2).all()
    seen = np.bincount(batches.ravel(), minlength=1120)
    assert set(seen[:50].tolist()) == {40}  # 2000 / 50: each as often as any other
    assert set(seen[50:1050].tolist()) == {6}


@pytest.mark.parametrize(
    ("weights", "said"), [([1], "1 numbers for 2"), ([1, 0], "above zero"), ([1, 99], "less than")]
)
def test_weights_that_do_not_fit(weights: list[float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Mixture([Order(50, 20, 1), Order(50, 20, 2)], weights, seed=0)
