"""Caption tables of any size: what the index gives is what the rows say."""

from __future__ import annotations

import json
import os
import pickle
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from declip.data.sources import Source, grouping, open_sources, text_table
from declip.data.sources.base import LONGEST_CAPTION
from declip.errors import InputError
from declip.pairs import Data

ROWS = [
    {"filename": f"{name}.jpg", "caption": f"text {number}", "class": f"class {number}"}
    for number, name in enumerate("abcabdaea")
]
PAIRS = [
    ("a.jpg", ("text 0", "text 3", "text 6", "text 8"), "line 1"),
    ("b.jpg", ("text 1", "text 4"), "line 2"),
    ("c.jpg", ("text 2",), "line 3"),
    ("d.jpg", ("text 5",), "line 6"),
    ("e.jpg", ("text 7",), "line 8"),
]


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table is a large one, and its batches are small."""
    monkeypatch.setattr(text_table, "SMALL", 0)
    monkeypatch.setattr(text_table, "_ROWS", 3)
    monkeypatch.setattr(grouping, "_ROWS", 2)


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def said(source: Source) -> list[tuple[str, tuple[str, ...], str]]:
    return [(source.key(i), source.captions(i), source.where(i).split(", ")[-1]) for i in range(len(source))]


def opened(path: Path, **data: object) -> Source:
    return open_sources([str(path)], Data.model_validate(data))


@pytest.mark.usefixtures("indexed")
def test_index_collects_the_captions_of_a_name(tmp_path: Path) -> None:
    path = write(tmp_path / "list.json", list(ROWS))
    assert said(opened(path)) == PAIRS
    assert sorted(os.listdir(tmp_path)) == ["list.json", "list.json.index"]
    assert [opened(path).captions(-1), opened(path).key(-5)] == [("text 7",), "a.jpg"]
    (tmp_path / "e.jpg").write_bytes(b"bytes")
    assert opened(path)[4].label == "class 7"


def test_small_tables_leave_no_index(tmp_path: Path) -> None:
    assert said(opened(write(tmp_path / "list.jsonl", list(ROWS)))) == PAIRS
    assert os.listdir(tmp_path) == ["list.jsonl"]


@pytest.mark.usefixtures("indexed")
def test_names_that_differ_stay_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "list.jsonl", [{"filename": f"{i}.jpg", "caption": f"text {i}"} for i in range(10)])
    assert said(opened(path)) == [(f"{i}.jpg", (f"text {i}",), f"line {i + 1}") for i in range(10)]


@pytest.mark.usefixtures("indexed")
def test_equal_hashes_of_unequal_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first two hashes, one knows no name from another and one but a few."""
    hashes = {0: lambda name: 7, 1: lambda name: ord(name[0]) % 2}
    monkeypatch.setattr(grouping, "name_hash", lambda name, salt: hashes.get(salt, hash)(name))
    monkeypatch.setattr(text_table, "name_hash", grouping.name_hash)
    assert said(opened(write(tmp_path / "list.jsonl", list(ROWS)))) == PAIRS


@given(names=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=40), rows=st.integers(1, 9))
def test_like_a_dictionary(tmp_path_factory: pytest.TempPathFactory, names: list[str], rows: int) -> None:
    expected: dict[str, list[str]] = {}
    for number, name in enumerate(names):
        expected.setdefault(name, []).append(f"text {number}")
    path = tmp_path_factory.mktemp("table") / "t.csv"
    path.write_text("filename,caption\n" + "".join(f"{name},text {i}\n" for i, name in enumerate(names)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_table, "SMALL", 0)
        patch.setattr(text_table, "_ROWS", rows)
        patch.setattr(grouping, "_ROWS", 10 - rows)
        source = opened(path)
    assert {key: list(captions) for key, captions, _ in said(source)} == expected
    assert [source.key(i) for i in range(len(source))] == list(expected)


@pytest.mark.usefixtures("indexed")
def test_a_table_or_columns_that_changed_are_indexed_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "list.jsonl", list(ROWS))
    assert len(opened(path)) == 5
    assert opened(path, captions=["class"]).captions(1) == ("class 1", "class 4")
    assert opened(path).captions(1) == ("text 1", "text 4")
    write(path, [*ROWS, {"filename": "f.jpg", "caption": "new"}])
    assert len(opened(path)) == 6
    index = tmp_path / "list.jsonl.index"
    index.write_bytes(index.read_bytes()[:200])
    assert len(opened(path)) == 6
    before = index.stat().st_mtime_ns
    assert len(opened(path)) == 6
    assert index.stat().st_mtime_ns == before


@pytest.mark.usefixtures("indexed")
def test_index_in_the_cache_where_the_folder_cannot_be_written(tmp_path: Path) -> None:
    path = write(tmp_path / "list.jsonl", list(ROWS))
    (tmp_path / "list.jsonl.index").mkdir()  # the place beside the table is taken
    assert said(opened(path, index_folder=str(tmp_path / "indices"))) == PAIRS
    assert [file.suffix for file in (tmp_path / "indices").iterdir()] == [".index"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"can be written nowhere .*data\.index_folder=FOLDER"):
        opened(path, index_folder=str(tmp_path / "file"))
    assert sorted(os.listdir(tmp_path)) == ["file", "indices", "list.jsonl", "list.jsonl.index"]


def _count(path: Path) -> int:
    return len(opened(path))


@pytest.mark.usefixtures("indexed")
def test_two_processes_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "list.jsonl", list(ROWS))
    with get_context("fork").Pool(2) as pool:
        assert pool.map(_count, [path] * 6) == [5] * 6
    assert sorted(os.listdir(tmp_path)) == ["list.jsonl", "list.jsonl.index"]


@pytest.mark.usefixtures("indexed")
def test_a_wrong_row_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "list.jsonl", [*ROWS, {"filename": "x.jpg", "caption": 7}])
    with pytest.raises(InputError, match=r"list\.jsonl, line 10, column caption: .* not 7"):
        opened(path)
    assert os.listdir(tmp_path) == ["list.jsonl"]


@pytest.mark.usefixtures("indexed")
def test_pickled_it_is_opened_again(tmp_path: Path) -> None:
    rows = [{"filename": f"{i}.jpg", "caption": "many words " * 100} for i in range(100)]
    source = opened(write(tmp_path / "list.jsonl", list(rows)))
    pickled = pickle.dumps(source)
    assert len(pickled) < 5000
    assert said(pickle.loads(pickled)) == said(source)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_captions_of_a_megabyte(tmp_path: Path, name: str) -> None:
    caption = "word " * 200_000
    text = (
        f"filename,caption\na.jpg,{caption}\n"
        if name == "t.csv"
        else json.dumps({"filename": "a.jpg", "caption": caption})
    )
    (tmp_path / name).write_text(text)
    assert opened(tmp_path / name).captions(0) == (caption[:LONGEST_CAPTION],)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        (
            "t.json",
            '[\n{"filename": "a.jpg", "caption": "A"}\n]',
            "line 1 begins a JSON array: write one JSON object a",
        ),
        ("t.json", '[{"filename": "a.jpg", "caption": "A"}]', "line 1 begins a JSON array"),
        ("t.jsonl", "[" * 100_000, "line 1 is not valid JSON"),
        ("t.jsonl", '{"filename": ' + "9" * 5000 + "}", "line 1 is not valid JSON"),
    ],
)
def test_no_lines_of_objects(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=sentence):
        opened(tmp_path / name)
