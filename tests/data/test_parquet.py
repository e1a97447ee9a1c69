"""Parquet files by row group: the same pairs as when a file is read whole, and what is wrong said in a sentence."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip.data import remote
from declip.data.sources import BrokenPair, Source, parquet
from declip.data.sources.parquet import ParquetSource, open_parquet
from declip.data.storage import Storage
from declip.errors import InputError
from declip.pairs import Data

FOUND = Data()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "cache", 10_000_000, retries=0)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set counts as a large one."""
    monkeypatch.setattr(parquet, "IN_MEMORY", -1)


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"key": f"k{n}", "image": b"%d" % n, "captions": [f"text {n}", "more"], "label": n % 3}
        for n in range(first, first + count)
    ]


def write(path: Path, written: list[dict[str, Any]], group: int = 3, schema: pa.Schema | None = None) -> str:
    pq.write_table(pa.Table.from_pylist(written, schema), path, row_group_size=group)
    return str(path)


def opened(storage: Storage, *paths: str, name: str = "set") -> ParquetSource:
    return open_parquet(name, paths, FOUND, storage, need_captions=True)


def everything(source: Source) -> list[Any]:
    """All that a source says of each pair, or why it is broken."""
    found = []
    for i in range(len(source)):
        about = (source.key(i), source.captions(i), source.where(i))
        try:
            found.append((about, source[i]))
        except BrokenPair as broken:
            found.append((about, str(broken)))
    return found


IMAGES = st.none() | st.binary(max_size=4)
WORDS = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)


def naive(path: str, file_rows: list[dict[str, Any]]) -> list[Any]:
    """What the rows of one file are, in plain Python."""
    found = []
    for n, row in enumerate(file_rows):
        texts = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
        captions = tuple(t for t in ((text or "").replace("\0", " ").strip() for text in texts) if t)
        key = str(n) if row["key"] is None else row["key"]
        image = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
        label = None if row["label"] is None else str(row["label"])
        where = f"{path}, row {n}"
        broken = None if captions and image else f"{where} (key {key}): "
        if broken:
            broken += "its image is empty" if captions else "it has no caption that is not empty"
        found.append(((key, captions, where), broken or (key, image, captions, label, where)))
    return found


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_equal_to_plain_python(data: st.DataObject) -> None:
    image = data.draw(st.sampled_from([pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary())])]))
    text = data.draw(st.sampled_from([pa.string(), pa.list_(pa.string()), pa.dictionary(pa.int32(), pa.string())]))
    kinds = [("key", pa.string()), ("image", image), ("caption", text), ("label", pa.int64())]
    row = st.fixed_dictionaries(
        {
            "key": WORDS,
            "image": st.fixed_dictionaries({"bytes": IMAGES}) if pa.types.is_struct(image) else IMAGES,
            "caption": st.lists(WORDS, max_size=2) if pa.types.is_list(text) else WORDS,
            "label": st.none() | st.integers(0, 2),
        }
    )
    files = data.draw(st.lists(st.lists(row, min_size=1, max_size=9), min_size=1, max_size=3))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "IN_MEMORY", data.draw(st.sampled_from([-1, 10**9])))
        patch.setattr(parquet, "_IMAGES", 2)
        storage = Storage(Path(folder) / "cache", 10**7, 0)
        group = data.draw(st.integers(1, 9))
        paths = [
            write(Path(folder) / f"{n}.parquet", written, group, pa.schema(kinds)) for n, written in enumerate(files)
        ]
        source = opened(storage, *paths, name=paths[0])
        found = [
            (about, pair if isinstance(pair, str) else (pair.key, pair.image, pair.captions, pair.label, pair.where))
            for about, pair in everything(source)
        ]
        assert found == [row for path, written in zip(paths, files, strict=True) for row in naive(path, written)]
        assert len(source) == len(found)


def test_shards_are_row_groups(storage: Storage, tmp_path: Path, large: None) -> None:
    source = opened(storage, write(tmp_path / "a.parquet", rows(7)), write(tmp_path / "b.parquet", rows(2, 7)))
    assert source.shards.tolist() == [0, 3, 6, 7, 9]
    assert [source[i].key for i in (8, 0, -1, 5)] == ["k8", "k0", "k8", "k5"]
    assert source.where(8) == f"{tmp_path}/b.parquet, row 1"
    with pytest.raises(IndexError):
        source[9]


def test_a_small_set_is_in_memory(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    small = opened(storage, write(path, rows(7)))
    path.unlink()
    assert small.shards.tolist() == [0, 7]
    assert len(everything(small)) == 7
    assert small[6].where == "set, row 6"
    assert not storage.folder.exists()


def test_captions_need_no_images(
    storage: Storage, tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened(storage, write(tmp_path / "a.parquet", rows(7)))
    read: list[str] = []
    unpack = parquet._unpack
    monkeypatch.setattr(parquet, "_unpack", lambda *args: (read.extend(args[2]), unpack(*args))[1])
    assert [source.captions(i)[0] for i in range(7)] == [f"text {n}" for n in range(7)]
    assert [source.key(i) for i in range(7)] == [f"k{n}" for n in range(7)]
    assert sorted(set(read)) == ["captions", "key", "label"]
    assert len(read) == 9


def test_a_row_group_is_unpacked_once(
    storage: Storage, tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", rows(7))
    first = everything(opened(storage, path))
    monkeypatch.setattr(parquet, "_unpack", lambda *args: pytest.fail("unpacked again"))
    source = opened(storage, path)
    assert everything(source) == first
    assert everything(pickle.loads(pickle.dumps(source))) == first


def test_more_than_the_cache_holds(tmp_path: Path, large: None) -> None:
    storage = Storage(tmp_path / "cache", 5000, 0)
    source = opened(storage, write(tmp_path / "a.parquet", rows(30)))
    for _ in range(2):
        source = pickle.loads(pickle.dumps(source))
        assert [pair.image for pair in source] == [b"%d" % n for n in range(30)]
        assert sum(path.stat().st_size for path in (storage.folder / "files").iterdir()) <= 5000


def test_labelled_images_alone(storage: Storage, tmp_path: Path, large: None) -> None:
    path = write(tmp_path / "a.parquet", [{"image": b"x"}, {"image": b"y"}], group=1)
    source = open_parquet("set", [path], FOUND, storage, need_captions=False)
    assert [(pair.key, pair.image, pair.captions) for pair in source] == [("0", b"x", ()), ("1", b"y", ())]
    assert source.key(1) == "1"


@pytest.mark.parametrize("limit", [-1, 10**9])
def test_text_that_is_not_utf8(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(parquet, "IN_MEMORY", limit)
    bad = pa.array([b"\xff\xfe", b"good"]).view(pa.string())
    lists = pa.ListArray.from_arrays([0, 2, 2], bad)
    for captions in (bad, lists):
        table = pa.table({"key": bad, "image": [b"x", b"y"], "caption": captions, "label": bad})
        pq.write_table(table, tmp_path / f"{captions.type}.parquet")
        source = opened(storage, str(tmp_path / f"{captions.type}.parquet"))
        assert source.key(0) == "\ufffd\ufffd"
    assert source.captions(0) == ("good",)
    assert source[0].label == "\ufffd\ufffd"
    source = opened(storage, str(tmp_path / "string.parquet"))
    assert source.captions(0) == ()
    with pytest.raises(BrokenPair, match="no caption"):
        source[0]
    assert source[1].captions == ("good",)


@pytest.mark.parametrize("limit", [-1, 10**9])
def test_class_names_that_a_schema_notes(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """As Hugging Face's hub has them, each file its own; -1 is no label, and 2 is past the second file's names."""
    monkeypatch.setattr(parquet, "IN_MEMORY", limit)
    paths = []
    for number, names in enumerate((["cat", "dog", "cow"], ["dog", "cat"])):
        noted = json.dumps({"info": {"features": {"key": {"dtype": "string"}, "label": {"names": names}}}})
        table = pa.Table.from_pylist([*rows(3), {**rows(1)[0], "label": -1}])
        pq.write_table(table.replace_schema_metadata({"huggingface": noted}), tmp_path / f"{number}.parquet")
        paths.append(str(tmp_path / f"{number}.parquet"))
    source = opened(storage, *paths)
    assert [pair.label for pair in source] == ["cat", "dog", "cow", None, "dog", "cat", None, None]
    assert [pickle.loads(pickle.dumps(source)).label(i) for i in (0, 4)] == ["cat", "dog"]


@pytest.mark.parametrize(
    "noted", [b"no json", b"[]", b'{"info": {"features": []}}', b'{"info": {"features": {"label": 1}}}']
)
def test_notes_that_say_no_names(storage: Storage, tmp_path: Path, noted: bytes) -> None:
    table = pa.Table.from_pylist(rows(2)).replace_schema_metadata({"huggingface": noted})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [pair.label for pair in opened(storage, str(tmp_path / "a.parquet"))] == ["0", "1"]


# What is wrong


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1" + b"x" * 100 + b"PAR1"])
def test_no_parquet_file(storage: Storage, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"^set cannot be read as a parquet file: [^\n]*$"):
        opened(storage, str(tmp_path / "a.parquet"))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_damage_is_an_input_error_or_is_not_noticed(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "IN_MEMORY", data.draw(st.sampled_from([-1, 10**9])))
        path = Path(write(Path(folder) / "a.parquet", rows(5), 2))
        content = bytearray(path.read_bytes())
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        else:
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        with suppress(InputError):
            assert len(everything(opened(Storage(Path(folder) / "cache", 10**7, 0), str(path)))) < 100


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": None}, "b.parquet holds null in column 'image', where .*a.parquet holds binary"),
        ({"label": "cat"}, "b.parquet holds string in column 'label', where .*a.parquet holds int64"),
    ],
)
def test_files_that_differ(storage: Storage, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    paths = [write(tmp_path / "a.parquet", rows(1)), write(tmp_path / "b.parquet", [rows(1)[0] | change])]
    with pytest.raises(InputError, match=said):
        opened(storage, *paths)


def test_a_column_that_one_file_lacks(storage: Storage, tmp_path: Path) -> None:
    lacking = {name: value for name, value in rows(1)[0].items() if name != "captions"}
    paths = [write(tmp_path / "a.parquet", rows(1)), write(tmp_path / "b.parquet", [lacking])]
    with pytest.raises(InputError, match=r"b.parquet has no column 'captions', where .*a.parquet holds list"):
        opened(storage, *paths)
    with pytest.raises(InputError, match=r"b.parquet has no caption column"):
        opened(storage, *reversed(paths))


def test_a_file_that_changed(storage: Storage, tmp_path: Path, large: None) -> None:
    path = write(tmp_path / "a.parquet", rows(7))
    source = opened(storage, path)
    assert source[0].key == "k0"
    write(tmp_path / "a.parquet", rows(7, 100))
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match=r"a.parquet has changed since it was opened: start again\."):
        source[4]
    os.unlink(path)
    with pytest.raises(InputError, match=r"There is no file '.*a.parquet'"):
        source[4]
    assert opened(storage, write(tmp_path / "a.parquet", rows(7, 200)))[0].key == "k200"


# Remote files


@pytest.fixture
def shelf() -> str:
    """A folder in fsspec's memory with two files."""
    files = remote.filesystem("memory://")
    for number in range(2):
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows(5, 5 * number)), buffer, row_group_size=2)
        files.pipe_file(f"memory://shelf/{number}.parquet", buffer.getvalue().to_pybytes())
    return "memory://shelf"


def test_remote_files(storage: Storage, tmp_path: Path, shelf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(storage, f"{shelf}/0.parquet", f"{shelf}/1.parquet")
    monkeypatch.setattr(remote, "fetch", lambda *args: pytest.fail("fetched for captions alone"))
    assert [source.captions(i)[0] for i in range(10)] == [f"text {n}" for n in range(10)]
    monkeypatch.undo()
    assert [pair.image for pair in source] == [b"%d" % n for n in range(10)]
    assert source.shards.tolist() == [0, 2, 4, 5, 7, 9, 10]
    assert source.where(7) == "memory://shelf/1.parquet, row 2"


def test_a_remote_file_that_changed(storage: Storage, shelf: str) -> None:
    source = opened(storage, f"{shelf}/0.parquet")
    assert source[0].key == "k0"
    files = remote.filesystem("memory://")
    files.pipe_file(f"{shelf}/0.parquet", files.cat_file(f"{shelf}/1.parquet"))
    with pytest.raises(InputError, match=r"0.parquet has changed since it was opened"):
        source[4]
