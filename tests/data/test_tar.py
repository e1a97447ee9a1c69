"""Tar shards: the same pairs as Python's tarfile reads, whatever wrote them, and what is damaged is said."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st

from declip.data.sources import BrokenPair, open_sources
from declip.data.sources.tar import TarSource, open_tar
from declip.errors import InputError
from declip.pairs import Data


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard(path: Path, first: int = 0, count: int = 5) -> Path:
    members = []
    for number in range(first, first + count):
        members += [(f"{number:05d}.png", picture(number)), (f"{number:05d}.txt", f"picture {number}".encode())]
    return write_tar(path, members)


def opened(*paths: Path, **options: Any) -> TarSource:
    return open_tar("shards", [str(path) for path in paths], Data(**options), False)


names = st.text(st.characters(codec="utf-8", exclude_characters="/.\0"), min_size=1, max_size=60)
keys = st.lists(st.lists(names, min_size=1, max_size=4).map("/".join), min_size=1, max_size=6, unique=True)


@given(keys, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.data())
@settings(max_examples=60, deadline=None)
def test_like_tarfile(keys: list[str], form: int, data: st.DataObject) -> None:
    members = []
    for key in keys:
        parts = {"jpg": b"image of " + key.encode(), "txt": b"caption of " + key.encode(), "other.bin": b"1" * 700}
        members += [(f"{key}.{name}", parts[name]) for name in data.draw(st.permutations(sorted(parts)))]
    with tempfile.TemporaryDirectory() as folder:
        path = write_tar(Path(folder) / "a.tar", members, form)
        with tarfile.open(path) as tar:
            read = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        source = opened(path)
        assert len(source) == len(keys)
        for i, key in enumerate(keys):
            pair = source[i]
            assert (pair.key, pair.image) == (key, read[f"{key}.jpg"])
            assert pair.captions == source.captions(i) == ((read[f"{key}.txt"].decode().strip(),))
        assert source.problems == []


def test_many_shards_are_one_source(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"{number:02d}.tar", 10 * number, 4 + number)
    for spec in (f"{tmp_path}/{{00..02}}.tar", f"{tmp_path}/*.tar", str(tmp_path)):
        source = open_sources([spec], Data())
        assert (len(source), source.name) == (15, spec)
        assert source.shards.tolist() == [0, 4, 9, 15]
        assert source[-1].image == picture(25)
        assert source.where(5) == f"{tmp_path}/01.tar, member 00011"
    copy = pickle.loads(pickle.dumps(source))
    assert copy[7] == source[7]


def test_captions_and_labels_of_json(tmp_path: Path) -> None:
    members = [("a.jpg", b"A"), ("a.json", json.dumps({"caption": " one ", "label": 3, "alt": "x"}).encode())]
    members += [("b.jpg", b"B"), ("b.json", b'{"captions": ["two", 5, "three"]}'), ("b.cls", b"dog\n")]
    members += [("c.jpg", b"C"), ("c.txt", b"own"), ("c.json", b"no json")]
    members += [("d.jpg", b"D"), ("d.txt", b"one\n"), ("d.json", b'{"captions": ["two", "one "]}')]
    members += [("e.jpg", b"E"), ("e.txt", b"own"), ("e.json", b'{"captions": ["alt", "title"]}')]
    members += [("f.jpg", b"F"), ("f.cls", b"7")]
    source = opened(write_tar(tmp_path / "a.tar", members))
    assert source.problems == []
    assert [(pair.captions, pair.label) for pair in map(source.__getitem__, range(6))] == [
        (("one",), "3"),
        (("two", "three"), "dog"),
        (("own",), None),
        (("two", "one"), None),  # all of .json, as it holds what .txt says
        (("own",), None),
        ((), "7"),
    ]
    assert opened(tmp_path / "a.tar", captions=["alt"]).captions(0) == ("x",)


def test_what_is_damaged_is_said_and_the_rest_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [
        ("../out.jpg", b"x"),
        ("/etc/passwd.txt", b"x"),
        ("a.jpg", b"A"),
        ("b.txt", b"b"),
        ("c.jpg", b"C" * 2000),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    source = opened(path)
    assert [source.key(i) for i in range(len(source))] == ["a", "b", "c"]
    assert source.problems == [
        f"{path}: 2 unsafe paths that were left out: ../out.jpg, /etc/passwd.txt",
        f"{path}: 1 captions without an image: b",
        f"{path}: 2 images without a caption: a, c",
    ]
    assert "unsafe paths" in capsys.readouterr().err
    with pytest.raises(BrokenPair, match=r"a\.tar, member a \(key a\): it has no caption"):
        source[0]
    with pytest.raises(BrokenPair, match="it has no image"):
        source[1]


@given(st.integers(1, 10**6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_cut_or_flipped_anywhere(place: int, cut: bool) -> None:
    """Whole members before the damage are read; nothing but BrokenPair and InputError is raised."""
    with tempfile.TemporaryDirectory() as folder:
        path = shard(Path(folder) / "a.tar")
        data = bytearray(path.read_bytes())
        place %= len(data)
        if cut:
            del data[place:]
        else:
            data[place] ^= 0xFF
        path.write_bytes(data)
        if cut and not place:
            with pytest.raises(InputError, match="is an empty file"):
                opened(path)
            return
        source = opened(path)
        whole = 0
        for i in range(len(source)):
            try:
                assert source[i].key
                whole += 1
            except BrokenPair:
                pass
        assert len(source) <= 6
        if cut and whole < 5:
            assert source.problems


@pytest.mark.parametrize(("content", "said"), [(b"", "is an empty file"), (b"\x1f\x8b\x08 ", "is compressed")])
def test_no_tar(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        opened(path)


def test_a_changed_shard_is_indexed_anew(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", count=3)
    assert len(opened(path)) == 3
    index = tmp_path / "a.tar.index"
    made = index.stat().st_mtime_ns
    assert len(opened(path)) == 3
    assert index.stat().st_mtime_ns == made
    shard(path, count=7)
    assert len(opened(path)) == 7
    index.write_bytes(index.read_bytes()[:100])
    assert len(opened(path)) == 7


def test_index_in_the_cache_where_the_folder_cannot_be_written(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar")
    (tmp_path / "a.tar.index").mkdir()  # the place beside the shard is taken
    cache = tmp_path / "indices"
    assert len(opened(path, index_folder=str(cache))) == 5
    assert [file.suffix for file in cache.iterdir()] == [".index"]


def _count(path: Path) -> int:
    return len(opened(path))


def test_two_processes_at_once(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", count=200)
    with get_context("fork").Pool(2) as pool:
        assert pool.map(_count, [path] * 6) == [200] * 6
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.index"]


def with_header(path: Path, start: int, field: bytes) -> Path:
    """The first header changed from byte `start` on, its checksum made right again."""
    data = bytearray(path.read_bytes())
    data[start : start + len(field)] = field
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("size", [b"-0000001000\0", b"+0000000100\0", b"0x000000010\0", b"\xff" * 12, b"77777777777\0"])
def test_a_size_that_is_none_ends_the_reading(tmp_path: Path, size: bytes) -> None:
    source = opened(with_header(shard(tmp_path / "a.tar"), 124, size))
    assert len(source) == 0
    assert source.problems


@given(st.binary(min_size=1, max_size=12), st.sampled_from([100, 124, 136, 156, 257, 345]))
@settings(max_examples=100, deadline=None)
def test_headers_of_any_content(field: bytes, start: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = opened(with_header(shard(Path(folder) / "a.tar"), start, field))
        assert len(source) <= 6  # a new name takes the image from its caption


@pytest.mark.parametrize(
    "record", ["11 size=²\n".encode(), b"9" * 5000 + b" size=1\n", b"0 path=x\n", b"12 size=-512\n"], ids=range(4)
)
def test_pax_records_that_say_nothing(tmp_path: Path, record: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, kind, data in (("pax", b"x", record), ("a.jpg", b"0", b"A"), ("a.txt", b"0", b"a")):
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            tar.addfile(info, io.BytesIO(data))
    assert opened(path)[0].captions == ("a",)


def test_only_members_that_follow_one_another_belong_together(tmp_path: Path) -> None:
    members = [("a.jpg", b"A"), ("b.bin", b"x"), ("a.txt", b"a"), ("a.bin", b"x"), ("a.cls", b"cat")]
    source = opened(write_tar(tmp_path / "a.tar", members))
    assert [(source.key(i), source.captions(i)) for i in range(len(source))] == [("a", ()), ("a", ("a",))]


def test_captions_of_several_fields(tmp_path: Path) -> None:
    fields = json.dumps({"en": "a cat", "de": ["eine Katze", "ein Tier"], "caption": "other"}).encode()
    path = write_tar(tmp_path / "a.tar", [("1.png", picture(1)), ("1.json", fields)])
    assert opened(path, captions=["en", "de"]).captions(0) == ("a cat", "eine Katze", "ein Tier")
    assert opened(path).captions(0) == ("other",)


def test_many_sources_share_their_open_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [shard(tmp_path / f"{number:03d}.tar", count=1) for number in range(150)]
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else pytest.skip("counts in /proc")
    sources = [opened(*shards) for _ in range(3)]
    for source in sources:
        assert all(source[index].image for index in range(len(source)))
    assert len(os.listdir("/proc/self/fd")) <= before + 140


def test_names_of_no_known_kind_are_counted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.png", picture(1)), ("1.txt", b"x"), ("2.avif", b"y"), ("3.a.jpg", b"z")])
    (problem,) = opened(path).problems
    assert problem.endswith("2 names without a member of a known kind: 2.avif, 3.a.jpg")
