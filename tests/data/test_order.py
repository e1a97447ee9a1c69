"""Which pair comes when."""

from __future__ import annotations

import numpy as np
import pytest

from declip.data.order import Order


def epoch(order: Order, number: int) -> np.ndarray:
    """The batches of an epoch: [batches, batch size]."""
    first = number * order.batches_per_epoch
    return np.stack([order.batch(first + batch) for batch in range(order.batches_per_epoch)])


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    order = Order(size=24, batch_size=4, seed=3)
    epochs = [epoch(order, number).ravel().tolist() for number in range(5)]
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
    assert order.batches_per_epoch == 2
    left_out = [frozenset(range(11)) - set(epoch(order, number).ravel().tolist()) for number in range(30)]
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
