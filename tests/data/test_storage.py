"""Local files, patterns and the cache on disk."""

from __future__ import annotations

import fcntl
import itertools
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip.data.storage import Storage, expand, is_remote, join
from declip.errors import InputError
from declip.pairs import Data


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "cache", 1000, retries=0)


def written(size: int):  # type: ignore[no-untyped-def]
    return lambda path: path.write_bytes(b"x" * size)


def kept_files(storage: Storage) -> set[str]:
    return {path.name.split("-", 1)[1] for path in (storage.folder / "files").iterdir() if path.name[0] != "."}


# Patterns and names


@pytest.mark.parametrize(("path", "remote"), [("s3://b/k", True), ("a/b", False), ("/a", False), ("C:\\a", False)])
def test_what_is_remote(path: str, remote: bool) -> None:
    assert is_remote(path) == remote


PIECES = st.recursive(
    st.text("ab/_", min_size=1, max_size=3).map(lambda text: [text])
    | st.tuples(st.integers(0, 12), st.integers(0, 3), st.integers(1, 3)).map(
        lambda t: [f"{{{t[0]:0{t[2]}d}..{t[0] + t[1]:0{t[2]}d}}}"]
    ),
    lambda parts: st.lists(st.lists(parts, min_size=1, max_size=2), min_size=2, max_size=3).map(lambda c: [tuple(c)]),
    max_leaves=5,
)


def pattern(piece: list) -> str:  # type: ignore[type-arg]
    """A piece as a pattern: a string, or braces of choices, each a sequence of pieces."""
    one = piece[0]
    return one if isinstance(one, str) else "{" + ",".join("".join(map(pattern, choice)) for choice in one) + "}"


def naive(piece: list) -> list[str]:  # type: ignore[type-arg]
    one = piece[0]
    if not isinstance(one, str):
        return ["".join(x) for choice in one for x in itertools.product(*map(naive, choice))]
    if one[0] != "{":
        return [one]
    first, last = one[1:-1].split("..")
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
    return [str(n).zfill(width) for n in range(int(first), int(last) + 1)]


@settings(max_examples=50, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=3))
def test_braces_are_what_a_shell_makes_of_them(pieces: list) -> None:  # type: ignore[type-arg]
    expected = ["".join(x) for x in itertools.product(*map(naive, pieces))]
    found = expand("s3://none/" + "".join(map(pattern, pieces)))
    assert set(found) == {f"s3://none/{path}" for path in expected}


def test_local_patterns(tmp_path: Path) -> None:
    for name in ("a1", "a0", "b0"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/a*") == [f"{tmp_path}/a0", f"{tmp_path}/a1"]
    assert expand(f"{tmp_path}/{{b,a}}0") == [f"{tmp_path}/b0", f"{tmp_path}/a0"]
    with pytest.raises(InputError, match="No file matches"):
        expand(f"{tmp_path}/c*")


def test_join() -> None:
    assert join("s3://b/folder/", "x/y") == "s3://b/folder/x/y"
    assert join("folder", "x/y") == os.path.join("folder", "x/y")
    assert join("folder", "http://h/x") == "http://h/x"


# Local files


def test_a_local_file_is_itself(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    before = storage.version(str(path))
    assert (storage.local(str(path)), storage.read(str(path))) == (path, b"abc")
    with storage.open(str(path)) as file:
        file.seek(1)
        assert file.read() == b"bc"
    assert storage.version(str(path)) == before
    path.write_bytes(b"abcd")
    assert storage.version(str(path)) != before
    assert not storage.folder.exists()


def test_a_local_file_that_is_not_there(storage: Storage, tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    for use in (storage.version, storage.local, storage.open):
        with pytest.raises(InputError, match=r"There is no file '.*none'"):
            use(missing)
    with pytest.raises(FileNotFoundError):
        storage.read(missing)


def test_of_a_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    storage = pickle.loads(pickle.dumps(Storage.of(Data(disk_gb=2, retries=3))))
    assert (storage.folder, storage.limit_bytes, storage.retries) == (tmp_path / "declip", 2_000_000_000, 3)
    assert Storage.of(Data(index_folder="here")).folder == Path("here")


def test_where_an_index_may_be(storage: Storage, tmp_path: Path) -> None:
    beside, far = storage.index_places(str(tmp_path / "a.tar"))
    assert beside == tmp_path / "a.tar.index"
    assert far.parent == storage.folder
    assert storage.index_places("s3://b/a.tar")[0].parent == storage.folder
    assert storage.index_places("s3://b/a.tar") != storage.index_places("s3://c/a.tar")


# The cache


def test_kept_is_filled_once(storage: Storage) -> None:
    calls = []
    for _ in range(2):
        path = storage.kept("a", lambda path: calls.append(path.write_bytes(b"abc")))
        assert path.read_bytes() == b"abc"
    assert calls == [3]


def test_a_fill_that_fails_leaves_nothing(storage: Storage) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise InputError("no")

    with pytest.raises(InputError, match=r"^no$"):
        storage.kept("a", fail)
    assert kept_files(storage) == set()
    assert storage.kept("a", written(3)).read_bytes() == b"xxx"


def test_what_was_used_longest_ago_is_dropped(storage: Storage) -> None:
    paths = {name: storage.kept(name, written(400)) for name in "ab"}
    for age, name in enumerate("ba"):
        os.utime(paths[name], (1000 + age, 1000 + age))  # b is the older one ...
    storage.kept("b", written(0))  # ... but used again
    with paths["a"].open("rb") as opened:
        storage.kept("c", written(400))
        assert kept_files(storage) == {"b", "c"}
        assert len(opened.read()) == 400


def test_larger_than_the_cache(storage: Storage) -> None:
    with pytest.raises(InputError, match=r"big takes 1,001 bytes, .* say data.disk_gb=0.1 or more"):
        storage.kept("big", written(1001))
    assert kept_files(storage) == set()


def test_what_a_killed_process_left_is_cleaned_up(storage: Storage) -> None:
    files = storage.folder / "files"
    files.mkdir(parents=True)
    left, busy = files / ".1-left.part", files / ".2-busy.part"
    left.write_bytes(b"x" * 900)
    busy.write_bytes(b"x" * 100)
    with busy.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        storage.kept("a", written(400))
        assert not left.exists()
        assert busy.exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be kept in .*file .*data.index_folder=FOLDER"):
        Storage(tmp_path / "file", 1000, 0).kept("a", written(1))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(storage: Storage) -> None:
    def fill(path: Path) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(InputError, match=r"a does not fit on the disk of .*free some space"):
        storage.kept("a", fill)


def _keep_all(storage: Storage, log: Path) -> None:
    for name in "abc":

        def fill(path: Path, name: str = name) -> None:
            with log.open("ab", buffering=0) as file:
                file.write(name.encode())
            path.write_text(name * 10)

        assert storage.kept(name, fill).read_text() == name * 10


def test_processes_share_what_one_has_made(storage: Storage, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_keep_all, args=(storage, tmp_path / "log")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted((tmp_path / "log").read_text()) == list("abc")


def _keep_and_die(storage: Storage) -> None:
    storage.kept("a", lambda path: (path.write_bytes(b"half"), os._exit(9)))


def test_a_process_that_dies_while_filling(storage: Storage) -> None:
    process = multiprocessing.get_context("fork").Process(target=_keep_and_die, args=(storage,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert storage.kept("a", written(3)).read_bytes() == b"xxx"
    assert [path.name for path in (storage.folder / "files").iterdir() if path.name.endswith(".part")] == []
