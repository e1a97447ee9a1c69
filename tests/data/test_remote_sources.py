"""Pairs in object stores and behind HTTP: the same as the same files on disk."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import pair, picture

from declip.data import remote
from declip.data.decoded import open_images
from declip.data.loader import BatchMaker, make_loader
from declip.data.sources import BrokenPair, Pair, Source, open_sources
from declip.data.storage import Storage, join
from declip.errors import InputError
from declip.pairs import Data
from declip.recipe import load_recipe

COUNT = 12  # pairs, in three shards


def as_tar(folder: Path) -> None:
    for first in range(0, COUNT, 4):
        with tarfile.open(folder / f"{first:02d}.tar", "w") as tar:
            for number in range(first, first + 4):
                for name, data in ((f"{number}.png", picture(number)), (f"{number}.txt", b"text %d" % number)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def as_parquet(folder: Path) -> None:
    for first in range(0, COUNT, 4):
        rows = pa.Table.from_pylist([pair(number) for number in range(first, first + 4)])
        pq.write_table(rows, folder / f"{first:02d}.parquet", row_group_size=2)


def as_hub(folder: Path) -> None:
    (folder / "data").mkdir()
    as_parquet(folder / "data")


def as_arrow(folder: Path) -> None:
    rows = pa.Table.from_pylist([pair(number) for number in range(COUNT)])
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows)


def as_table(folder: Path) -> None:
    (folder / "images").mkdir()
    with (folder / "captions.jsonl").open("w") as table:
        for number in range(COUNT):
            (folder / "images" / f"{number}.png").write_bytes(picture(number))
            print(json.dumps({"filename": f"images/{number}.png", "caption": f"text {number}"}), file=table)


def everything(source: Source) -> list[Any]:
    return [(one.key, one.image, one.captions, one.label) for one in map(source.__getitem__, range(len(source)))]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(index_folder=str(tmp_path / "cache"))


def uploaded(store: Any, folder: Path, name: str) -> str:
    url = f"s3://shards/{name}"
    for path in folder.rglob("*"):
        if path.is_file():
            store.pipe_file(f"{url}/{path.relative_to(folder)}", path.read_bytes())
    return url


@pytest.mark.parametrize("write", [as_tar, as_parquet, as_hub, as_arrow, as_table], ids=lambda write: write.__name__)
def test_a_folder_of_a_store(object_store: Any, tmp_path: Path, data: Data, write: Callable[[Path], None]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder)
    url = uploaded(object_store, folder, write.__name__)
    there, here = open_sources([url], data), open_sources([str(folder)], Data())
    assert everything(there) == everything(here)
    assert len(there) == COUNT
    assert url in there.where(0)
    assert everything(pickle.loads(pickle.dumps(there))) == everything(here)


def test_a_pattern_in_a_store(object_store: Any, tmp_path: Path, data: Data) -> None:
    as_tar(tmp_path)
    url = uploaded(object_store, tmp_path, "patterns")
    here = everything(open_sources([f"{tmp_path}/*.tar"], Data()))
    assert everything(open_sources([f"{url}/*.tar"], data)) == here
    assert everything(open_sources([f"{url}/{{00,04,08}}.tar"], data)) == here
    with pytest.raises(InputError, match=r"There is no s3://shards/patterns/09.tar"):
        open_sources([f"{url}/09.tar"], data)
    with pytest.raises(InputError, match="holds no tar shards"):
        open_sources(["s3://shards/empty"], data)


def test_an_index_is_used_again_without_the_shard(
    object_store: Any, tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_tar(tmp_path)
    url = uploaded(object_store, tmp_path, "again")
    captions = [open_sources([url], data).captions(i) for i in range(COUNT)]
    with monkeypatch.context() as patch:
        patch.setattr(remote, "fetch", lambda *args: pytest.fail("fetched to be indexed again"))
        again = open_sources([url], data)
        for copy in (tmp_path / "cache" / "files").iterdir():
            copy.unlink()
        assert [again.key(i) for i in range(COUNT)] == [str(number) for number in range(COUNT)]
    source = open_sources([url], data)
    object_store.pipe_file(f"{url}/04.tar", object_store.cat_file(f"{url}/00.tar"))
    for copy in (tmp_path / "cache" / "files").iterdir():  # as if the cache had dropped them
        copy.unlink()
    assert source.captions(0) == captions[0]
    with pytest.raises(InputError, match=r"04.tar has changed since it was opened"):
        source[4]
    assert open_sources([url], data).captions(4) == captions[0]


def test_batches_of_a_store_with_little_room(object_store: Any, tmp_path: Path, data: Data) -> None:
    """Loader processes share the copies, of which only two fit, and make the same batches as from the disk."""
    as_tar(tmp_path)
    largest = max(path.stat().st_size for path in tmp_path.glob("*.tar"))
    little = data.model_copy(update={"disk_gb": 2.5 * largest / 1e9})
    url = uploaded(object_store, tmp_path, "little")
    recipe = load_recipe("clip", ["schedule.batch_size=4", "data.shuffle_window=4"])

    def batches(source: Source, workers: int) -> list[np.ndarray]:
        maker = BatchMaker(open_images(source, 0.0, 0.0), recipe, 16, 77)
        return [batch.images.numpy() for batch in make_loader(maker, 0, 6, workers)]

    found = batches(open_sources([url], little), 2)
    for one, other in zip(found, batches(open_sources([str(tmp_path)], Data()), 0), strict=True):
        np.testing.assert_array_equal(one, other)
    held = sum(path.stat().st_size for path in (tmp_path / "cache" / "files").iterdir())
    assert held <= little.disk_gb * 1e9


def test_a_shard_that_cannot_be_read_is_named(
    object_store: Any, tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_tar(tmp_path)
    url = uploaded(object_store, tmp_path, "failing")
    waits: list[float] = []
    monkeypatch.setattr(remote, "sleep", waits.append)
    source = open_sources([url], data)
    for copy in (tmp_path / "cache" / "files").iterdir():
        copy.unlink()

    def cut(path: str, *args: Any, **options: Any) -> None:
        raise ConnectionError("cut off")

    monkeypatch.setattr(object_store, "get_file", cut)
    with pytest.raises(InputError, match=rf"{url}/08.tar could not be read, tried 6 times: cut off"):
        source[8]
    assert len(waits) == 5


def test_images_that_are_somewhere_else(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("filename,caption\nhttps://example.org/a.jpg,a cat\n")
    source = open_sources([str(tmp_path)], Data())
    with pytest.raises(BrokenPair, match=r"lies at https://example.org/a.jpg: fetch the images first"):
        source[0]


def test_an_image_that_a_store_does_not_have(object_store: Any, tmp_path: Path, data: Data) -> None:
    as_table(tmp_path)
    (tmp_path / "images" / "3.png").unlink()
    source = open_sources([uploaded(object_store, tmp_path, "missing")], data)
    assert isinstance(source[2], Pair)
    with pytest.raises(BrokenPair, match=r"cannot read image images/3.png: There is no such object"):
        source[3]


def test_a_copy_that_is_dropped_before_it_is_opened(
    object_store: Any, tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_tar(tmp_path)
    source = open_sources([uploaded(object_store, tmp_path, "dropped")], data)
    local, dropped = Storage.local, []

    def drop(self: Storage, path: str, version: str | None = None) -> Path:
        copy = local(self, path, version)
        if len(dropped) < 2:
            dropped.append(copy)
            copy.unlink()
        return copy

    monkeypatch.setattr(Storage, "local", drop)
    assert isinstance(source[0], Pair)
    assert len(dropped) == 2


def test_names_in_the_urls_of_pages(tmp_path: Path) -> None:
    assert join("https://h/f", "a b#1?.jpg") == "https://h/f/a%20b%231%3F.jpg"
    assert join("s3://b/f", "a b#1?.jpg") == "s3://b/f/a b#1?.jpg"
