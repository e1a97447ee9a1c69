"""Equal captions and images in different batches."""

from __future__ import annotations

import pickle

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from declip.data.apart import BLOCK, Apart, text_hash
from declip.data.order import Order


class Classes:
    """Pairs of equal remainder are equal."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, index: int) -> list[int]:
        return [index % self.count]


@given(st.integers(10, 200), st.integers(2, 10), st.integers(1, 50), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_every_pair_as_often_as_without(size: int, batch_size: int, classes: int, seed: int) -> None:
    plain = Order(size, batch_size, seed)
    apart = Apart(plain, Classes(classes))
    for block in range(3):
        numbers = range(block * BLOCK, (block + 1) * BLOCK)
        expected = np.concatenate([plain.batch(number) for number in numbers])
        made = np.concatenate([apart.batch(number) for number in numbers])
        assert sorted(made.tolist()) == sorted(expected.tolist())


def test_no_equals_in_a_batch() -> None:
    """Sixty classes of ten pairs in batches of twenty: two of a class meet by chance in nearly every batch."""
    plain = Order(600, 20, seed=1)
    apart = Apart(plain, Classes(60))

    def doubled(order: Order | Apart) -> int:
        return sum(len(set((order.batch(number) % 60).tolist())) < 20 for number in range(48))

    assert doubled(plain) > 40
    assert doubled(apart) <= 3  # the last places of a block may leave no choice


def test_a_pure_function() -> None:
    apart = Apart(Order(100, 10, seed=1), Classes(30))
    copy = pickle.loads(pickle.dumps(apart))
    assert [copy.batch(n).tolist() for n in (40, 3)] == [apart.batch(n).tolist() for n in (3, 40)][::-1]


def test_captions_are_equal_but_for_case_and_space() -> None:
    assert text_hash("A red  Cat ") == text_hash("a red cat")
    assert text_hash("a red cat") != text_hash("a red cats")
    assert 0 <= text_hash("\ud800") < 2**63
