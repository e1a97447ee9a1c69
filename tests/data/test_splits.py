"""Parts of sources: positions, held-out pairs and fractions, also of sets too large to read every key."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import keys, numbered
from hypothesis import given, settings
from hypothesis import strategies as st

from declip.data.sources import Pair, Source, open_sources, split_holdout, splits, take_fraction
from declip.data.sources.splits import Without
from declip.errors import InputError
from declip.pairs import Data

FOUND = Data()


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


@pytest.mark.parametrize("kind", ["table", "subset"])
def test_positions(tmp_path: Path, kind: str) -> None:
    source: Source = open_sources([numbered(tmp_path / "a.parquet", 5)], FOUND)
    if kind == "subset":
        source, _ = split_holdout(source, 0, 0)
    assert source[-1] == source[4] == source[np.int64(4)]  # type: ignore[index]
    for outside in (5, -6):
        for access in (source.__getitem__, source.captions, source.key):
            with pytest.raises(IndexError):
                access(outside)


def test_sources_survive_pickling(tmp_path: Path) -> None:
    source = open_sources([numbered(tmp_path / "a.parquet", 40), "demo:noto"], FOUND)
    train, _ = split_holdout(source, 0.5, 0)
    again = pickle.loads(pickle.dumps(train))
    assert len(again) == len(train)
    assert again[3] == train[3]


def test_holdout_is_a_deterministic_partition(tmp_path: Path) -> None:
    source = open_sources([numbered(tmp_path / "a.parquet", 200)], FOUND)
    train, held = split_holdout(source, 0.1, 5)
    assert (len(train), len(held)) == (180, 20)
    assert sorted(keys(train) + keys(held)) == sorted(keys(source))
    assert keys(split_holdout(source, 0.1, 5)[1]) == keys(held)
    assert keys(split_holdout(source, 0.1, 6)[1]) != keys(held)
    assert set(keys(held)) < set(keys(split_holdout(source, 0.2, 5)[1]))
    assert held[0] == source[int(held.indices[0])]
    assert held.captions(0) == held[0].captions


def test_holdout_goes_by_key_and_not_by_order(tmp_path: Path) -> None:
    parts = [numbered(tmp_path / "a.parquet", 50), numbered(tmp_path / "b.parquet", 50, first=50)]
    forwards, backwards = (split_holdout(open_sources(specs, FOUND), 0.2, 0)[1] for specs in (parts, parts[::-1]))
    assert set(keys(forwards)) == set(keys(backwards))
    train, held = split_holdout(open_sources([parts[0], parts[0]], FOUND), 0.2, 0)
    assert not set(keys(train)) & set(keys(held))


def test_holdout_of_little(tmp_path: Path) -> None:
    two = open_sources([numbered(tmp_path / "a.parquet", 2)], FOUND)
    assert [len(part) for part in split_holdout(two, 0.01, 0)] == [1, 1]
    assert [len(part) for part in split_holdout(two, 0, 0)] == [2, 0]
    one = open_sources([numbered(tmp_path / "b.parquet", 1)], FOUND)
    with pytest.raises(InputError, match="too few pairs"):
        split_holdout(one, 0.1, 0)


def test_holdout_is_the_same_everywhere(tmp_path: Path) -> None:
    """A run that is resumed elsewhere, or after an update, must hold out the same pairs."""
    source = open_sources([numbered(tmp_path / "a.parquet", 20)], FOUND)
    assert split_holdout(source, 0.2, 0)[1].indices.tolist() == [7, 10, 14, 17]


def test_fractions_are_nested(tmp_path: Path) -> None:
    source = open_sources([numbered(tmp_path / "a.parquet", 200)], FOUND)
    parts = [take_fraction(source, fraction, 1) for fraction in (0.001, 0.25, 0.5, 1.0)]
    assert [len(part) for part in parts] == [1, 50, 100, 200]
    for smaller, larger in pairwise(parts):
        assert set(keys(smaller)) < set(keys(larger))
    assert keys(parts[1]) == sorted(keys(parts[1]), key=lambda key: int(key[1:]))
    assert keys(take_fraction(source, 0.25, 1)) == keys(parts[1])
    assert keys(take_fraction(source, 0.25, 2)) != keys(parts[1])


def test_fraction_and_holdout_are_independent(tmp_path: Path) -> None:
    source = open_sources([numbered(tmp_path / "a.parquet", 400)], FOUND)
    held = set(keys(split_holdout(source, 0.5, 0)[1]))
    both = held & set(keys(take_fraction(source, 0.5, 0)))
    assert 70 < len(both) < 130


def test_what_is_held_out_of_a_large_set_lies_in_few_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "BY_KEY", 0)
    monkeypatch.setattr(splits, "HELD_SHARDS", 3)
    _, held = split_holdout(Numbers(7000), 0.001, 0)
    assert len(held) == 7
    assert len(set(held.indices // 7)) <= 3
    _, held = split_holdout(Numbers(7000), 0.1, 0)
    assert len(set(held.indices.tolist())) == 700
    assert 100 < len(set(held.indices // 7)) <= 200
    other = split_holdout(Numbers(7000), 0.1, 1)[1]
    assert other.indices.tolist() != held.indices.tolist()
