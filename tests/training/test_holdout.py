"""Pairs held out by picture: copies stay together, and the order of the pairs says nothing."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from conftest import keys, pair, write_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import picture
from PIL import Image

from declip.data.sources import connected
from declip.errors import InputError
from declip.pairs import Data
from declip.training import pairs as training_pairs
from declip.training.pairs import groups_of_pictures, open_pairs, pairs_set_aside

COPIES = {3: 30, 7: 31, 12: 32, 20: 33, 31: 34}
"""Pairs that show the picture of another one, and their numbers: 34 is a copy of a copy."""


def saved(number: int, quality: int) -> bytes:
    """A JPEG; of another quality it is a near copy."""
    buffer = io.BytesIO()
    Image.fromarray(picture(48, 64, number)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def rows() -> list[dict[str, Any]]:
    """Thirty pictures, and five copies of them, exact and near ones."""
    found = [{**pair(number), "image": saved(number, 95)} for number in range(30)]
    for original, number in COPIES.items():
        shown = original if original < 30 else 7
        found.append({**pair(number), "image": saved(shown, 95 if number % 2 else 80)})
    return found


def split(path: Path, given: list[dict[str, Any]], **options: Any) -> tuple[set[str], set[str]]:
    data = Data(train=str(write_pairs(path, given)), holdout=0.3, holdout_by="picture", workers=0, **options)
    train, held = open_pairs(data)
    assert held is not None
    return set(keys(train)), set(keys(held))


def test_copies_stay_together_whatever_the_order(tmp_path: Path) -> None:
    train, held = split(tmp_path / "a.parquet", rows())
    assert not train & held
    assert len(train | held) == 35
    assert len(held) == 10
    for original, copy in COPIES.items():
        assert ({f"k{original}", f"k{copy}"} <= train) or ({f"k{original}", f"k{copy}"} <= held)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(35)
        assert split(tmp_path / f"{seed}.parquet", [rows()[i] for i in order]) == (train, held)


def test_also_across_sources_with_weights(tmp_path: Path) -> None:
    whole = split(tmp_path / "a.parquet", rows())
    parts = [write_pairs(tmp_path / "b.parquet", rows()[:30]), write_pairs(tmp_path / "c.parquet", rows()[30:])]
    data = Data(train=[str(part) for part in parts], weights=[1, 1], holdout=0.3, holdout_by="picture", workers=0)
    train, held = open_pairs(data)
    assert held is not None
    assert (set(keys(train)), set(keys(held))) == whole


@pytest.mark.parametrize("by", ["key", "picture"])
@pytest.mark.parametrize("weights", [[], [1.0, 2.0]], ids=["joined", "weights"])
def test_what_is_set_aside_is_never_seen(tmp_path: Path, by: Literal["key", "picture"], weights: list[float]) -> None:
    """Nor is a copy of it, by picture; also of sources that are drawn from with weights."""
    parts = [write_pairs(tmp_path / "b.parquet", rows()[:30]), write_pairs(tmp_path / "c.parquet", rows()[30:])]
    data = Data(
        train=[str(part) for part in parts], weights=weights, set_aside=0.3, holdout=0.2, holdout_by=by, workers=0
    )
    train, held = open_pairs(data)
    assert held is not None
    sides = [set(keys(train)), set(keys(held)), set(keys(pairs_set_aside(data)))]
    assert len(set.union(*sides)) == sum(map(len, sides)) == 35
    assert len(sides[2]) in (10, 11)
    whole = [any({f"k{original}", f"k{copy}"} <= side for side in sides) for original, copy in COPIES.items()]
    assert all(whole) == (by == "picture")


def test_a_key_of_several_sources_is_held_out_of_all(tmp_path: Path) -> None:
    """Also what is set aside; each source draws its share among other keys, so that alone they would not agree."""
    ranges = {"a": range(400), "b": range(300, 360), "c": range(350, 366)}
    paths = [
        write_pairs(tmp_path / f"{name}.parquet", [pair(number) for number in numbers])
        for name, numbers in ranges.items()
    ]
    data = Data(train=[str(path) for path in paths], weights=[1, 1, 1], set_aside=0.2, holdout=0.3, workers=0)
    train, held = open_pairs(data)
    assert held is not None
    sides = [keys(train), keys(held), keys(pairs_set_aside(data))]
    assert sum(map(len, sides)) == 476
    for one, other in itertools.combinations(map(set, sides), 2):
        assert not one & other
    for numbers in ranges.values():  # a fifth, then three tenths of what is left, of each
        own = [sum(key in {f"k{number}" for number in numbers} for key in set(side)) for side in sides]
        assert own[2] >= 0.2 * len(numbers) - 1
        assert own[1] >= 0.24 * len(numbers) - 1


def test_row_numbers_of_several_sources_say_nothing(tmp_path: Path) -> None:
    rows = [{name: value for name, value in pair(number).items() if name != "key"} for number in range(440)]
    paths = [write_pairs(tmp_path / "a.parquet", rows[:400]), write_pairs(tmp_path / "b.parquet", rows[400:])]
    alone = [open_pairs(Data(train=str(path), holdout=0.1))[1] for path in paths]
    _, held = open_pairs(Data(train=[str(path) for path in paths], weights=[1, 1], holdout=0.1))
    assert held is not None
    assert keys(held) == [key for one in alone if one is not None for key in keys(one)]
    assert len(held) == 44


def test_pictures_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from declip.curation import groups

    first = split(tmp_path / "a.parquet", rows())
    monkeypatch.setattr(groups, "scan", lambda *_: pytest.fail("the groups are kept"))
    assert split(tmp_path / "a.parquet", rows()) == first


def test_one_picture_alone_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="all 4 pictures are copies of one another"):
        split(tmp_path / "a.parquet", [{**pair(number), "image": saved(1, 95)} for number in range(4)])


def test_equal_keys_and_large_groups(tmp_path: Path) -> None:
    """A group that is larger than the share is not torn, nor is a key; without smaller ones the smallest is taken."""
    given = [{**pair(number), "image": saved(number // 5, 95), "key": f"k{number // 5}"} for number in range(10)]
    train, held = split(tmp_path / "a.parquet", given)
    assert {len(train), len(held)} == {1}


def test_more_than_are_looked_at_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_pairs, "BY_KEY", 34)
    with pytest.raises(InputError, match=r"data\.holdout_by = picture looks at every picture, and .* has 35 pairs"):
        split(tmp_path / "a.parquet", rows())


def test_broken_pictures_are_groups_of_their_own(tmp_path: Path) -> None:
    given = rows()
    given[4]["image"] = given[5]["image"] = b"none"
    source, _ = open_pairs(Data(train=str(write_pairs(tmp_path / "a.parquet", given)), holdout=0))
    groups = groups_of_pictures(source, Data(workers=0))
    assert groups[[3, 4, 5, 30, 31, 34]].tolist() == [3, 4, 5, 3, 7, 7]


@given(st.integers(1, 12), st.data())
@settings(deadline=None)
def test_connected_is_a_walk(count: int, data: st.DataObject) -> None:
    item = st.integers(0, count - 1)
    edges = data.draw(st.lists(st.tuples(item, item), max_size=12))
    found = connected(count, np.array(edges, np.int64).reshape(-1, 2))
    for start in range(count):
        reached = {start}
        while more := {b for pair in edges for a, b in (pair, pair[::-1]) if a in reached} - reached:
            reached |= more
        assert found[start] == min(reached)
