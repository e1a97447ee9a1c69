"""Held-out pairs and fractions, also of sets of which nobody wants to read every key."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip.data.sources import Pair, split_holdout, splits, take_fraction
from declip.data.sources.splits import Without


class Numbers:
    """Pairs named by their number, in shards of seven."""

    name = "numbers"

    def __init__(self, size: int) -> None:
        self.size = size

    @property
    def shards(self) -> np.ndarray:
        return np.append(np.arange(0, self.size, 7), self.size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int, /) -> Pair:
        return Pair(self.key(i), b"", (), None, "")

    def captions(self, i: int, /) -> tuple[str, ...]:
        return (str(i),)

    def key(self, i: int, /) -> str:
        return str(i)

    def where(self, i: int, /) -> str:
        return f"place {i}"


@given(st.integers(1, 60), st.data())
@settings(deadline=None)
def test_without_is_the_list_without(size: int, data: st.DataObject) -> None:
    removed = sorted(data.draw(st.sets(st.integers(0, size - 1))))
    kept = [i for i in range(size) if i not in removed]
    source = Without(Numbers(size), np.array(removed, np.int64))
    assert [source.key(i) for i in range(len(source))] == [str(i) for i in kept]
    if kept:
        assert source.key(-1) == source[len(kept) - 1].key == str(kept[-1])
        assert (source.captions(0), source.where(0)) == ((str(kept[0]),), f"place {kept[0]}")
        naive = [[i for i in kept if i // 7 == shard] for shard in range(size // 7 + 1)]
        starts = np.cumsum([0] + [len(shard) for shard in naive if shard])
        assert source.shards.tolist() == starts.tolist()
    with pytest.raises(IndexError):
        source.key(len(kept))


@pytest.mark.parametrize("by_key", [True, False])
def test_split_and_fraction_by_key_or_place(monkeypatch: pytest.MonkeyPatch, by_key: bool) -> None:
    if not by_key:
        monkeypatch.setattr(splits, "BY_KEY", 0)
        monkeypatch.setattr(Numbers, "key", lambda *_: pytest.fail("a large set's keys are not to be read"))
    train, held = split_holdout(Numbers(1000), 0.1, seed=0)
    assert len(held) == 100
    parts = [[int(part.captions(i)[0]) for i in range(len(part))] for part in (train, held)]
    assert sorted(parts[0] + parts[1]) == list(range(1000))
    assert 350 < np.mean(parts[1]) < 650
    small, large = (take_fraction(train, share, seed=3) for share in (0.2, 0.5))
    chosen = [{part.captions(i)[0] for i in range(len(part))} for part in (small, large)]
    assert [len(part) for part in chosen] == [180, 450]
    assert chosen[0] < chosen[1]


def test_of_many_pairs_few_are_held_out() -> None:
    train, held = split_holdout(Numbers(100_000_000), 0.1, seed=0)
    assert len(held) == splits.MOST_HELD
    assert len(train) == 100_000_000 - splits.MOST_HELD
    assert train.captions(-1) != held.captions(-1)
