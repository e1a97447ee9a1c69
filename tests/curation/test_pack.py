"""A pack has every usable pair of its source, is the same however it was made, and knows when it is not whole."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import pair, picture, write_pairs
from data.test_bad_input import FORMATS, IMAGES, PLACES, Row, decodes, read_all
from rich.console import Console

from declip.curation import shard as module
from declip.curation.pack import pack, print_packed
from declip.curation.verify import print_verified, verify
from declip.data.decode import decode_image
from declip.data.sources import open_sources
from declip.errors import InputError, RunStopped
from declip.pairs import Data


def content(folder: Path) -> dict[str, Any]:
    """All that is in a folder; of an index the rows, as it also names the time that its shard was written at."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".index":
            with pa.memory_map(str(path)) as mapped:
                found[path.name] = pa.ipc.open_file(mapped).read_all().to_pylist()
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_round_trip_of_every_format(form: str, tmp_path: Path) -> None:
    draw = random.Random(form)
    captions = ["fine", "empty", "NUL", "Chinese", "markup", "spaces of Unicode"]
    rows = [Row(image, caption) for image in IMAGES for caption in ("fine", draw.choice(captions))]
    rows += [Row("fine", "fine", missing, place) for missing in (None, "image", "caption") for place in PLACES]
    draw.shuffle(rows)
    (tmp_path / "in").mkdir()
    path = FORMATS[form](tmp_path / "in", rows)
    before, broken, _ = read_all(path)
    expected = [pair for pair in before if decodes(pair.image)]
    result = pack([str(path)], tmp_path / "out", Data(), shard_pairs=7, workers=0)
    after, broken_after, _ = read_all(tmp_path / "out")
    assert broken_after == []
    assert [(p.image, p.captions, p.label) for p in after] == [(p.image, p.captions, p.label) for p in expected]
    left_out = len(before) - len(expected) + len(broken)
    assert result["pairs"] == len(expected)
    assert sum(result["left_out"].values()) == left_out == result["source_pairs"] - len(expected)
    log = [json.loads(line) for line in (tmp_path / "out" / "log" / "left-out.jsonl").read_text().splitlines()]
    assert len(log) == left_out
    assert {error.where for error in broken} <= {row["place"] for row in log}
    assert json.loads(json.dumps(result)) == result


def test_all_of_a_pair_is_kept(pairs: Path, tmp_path: Path) -> None:
    pack([str(pairs)], tmp_path / "out", Data(), shard_pairs=16, workers=2)
    before, after = (open_sources([str(path)], Data()) for path in (pairs, tmp_path / "out"))
    assert [(p.key, p.image, p.captions, p.label) for p in map(before.__getitem__, range(40))] == [
        (p.key, p.image, p.captions, p.label) for p in map(after.__getitem__, range(40))
    ]
    assert after.shards.tolist() == [0, 16, 32, 40]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [(one["file"], one["pairs"]) for one in manifest["shards"]] == [
        ("00000.tar", 16), ("00001.tar", 16), ("00002.tar", 8)
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"0000{n}.tar{end}" for n in range(3) for end in ("", ".index")), "manifest.json", "sizes.json"
    ]  # fmt: skip
    index = tmp_path / "out" / "00001.tar.index"
    made = index.stat().st_mtime_ns
    open_sources([str(tmp_path / "out")], Data())
    assert index.stat().st_mtime_ns == made  # it was fresh


def test_labelled_images_without_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": picture(n), "label": label} for n, label in enumerate(["3", "a dog", None])]
    result = pack([str(write_pairs(tmp_path / "a.parquet", rows))], tmp_path / "out", Data(), workers=0)
    source = open_sources([str(tmp_path / "out")], Data(), need_captions=False)
    assert [source[i].label for i in range(len(source))] == ["3", "a dog"]
    assert result["left_out"] == {"it has neither a caption nor a label": 1}
    assert capsys.readouterr().err == ""


def test_any_number_of_workers(tmp_path: Path) -> None:
    rows = [pair(n) if n % 5 else {**pair(n), "image": b"<html>"} for n in range(30)]
    source = [str(write_pairs(tmp_path / "a.parquet", rows)), str(write_pairs(tmp_path / "b.parquet", rows[:11]))]
    told: list[tuple[str, int, int]] = []
    for workers in (0, 1, 3):
        out = tmp_path / str(workers)
        pack(source, out, Data(), resize=12, shard_pairs=4, workers=workers, progress=lambda *said: told.append(said))
        assert told[-1] == ("packing pairs", 41, 41)
        assert content(out) == content(tmp_path / "0")
    assert verify(tmp_path / "3")["whole"]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = module.kept_pair

    def slowly(*given: Any) -> Any:
        time.sleep(0.004)
        return kept(*given)

    monkeypatch.setattr(module, "kept_pair", slowly)


def alive(leader: int) -> bool:
    """Whether a process or one of those it started still runs."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(") ")[2].split()[:4]
            if int(session) == leader and state != "Z":
                return True
    return False


def _as_leader(*given: Any, **options: Any) -> None:
    os.setsid()  # by which those that it starts are found
    pack(*given, **options)


@pytest.fixture
def started(slow: None, pairs: Path, tmp_path: Path) -> Iterator[Callable[[Path], Any]]:
    """Starts packing in another process."""
    processes = []

    def start(out: Path) -> Any:
        options = {"shard_pairs": 5, "workers": 2, "resize": 15}
        process = get_context("fork").Process(target=_as_leader, args=([str(pairs)], out, Data()), kwargs=options)
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
def test_killed_at_any_point(started: Callable[[Path], Any], pairs: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    out, whole = tmp_path / "out", tmp_path / "whole"
    pack([str(pairs)], whole, Data(), shard_pairs=5, resize=15, workers=0)
    kills = 0
    for _ in range(25):
        process = started(out)
        process.join(draw.uniform(0.0, 0.15))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
            process.join()
            end = time.monotonic() + 10
            while alive(process.pid):
                assert time.monotonic() < end, "a worker lives on"
                time.sleep(0.01)
            if (out / "unfinished.json").exists():
                with pytest.raises(InputError, match="is not finished"):
                    open_sources([str(out)], Data())
    result = pack([str(pairs)], out, Data(), shard_pairs=5, resize=15, workers=0)
    assert kills
    assert content(out) == content(whole)
    assert result["pairs"] == 40


def test_two_at_once(started: Callable[[Path], Any], pairs: Path, tmp_path: Path) -> None:
    started(tmp_path / "out")
    while not (tmp_path / "out" / "log").exists():
        time.sleep(0.002)
    with pytest.raises(InputError, match=r"^Another process packs into .*/out: wait for it\.$"):
        pack([str(pairs)], tmp_path / "out", Data(), shard_pairs=5, resize=15)


def test_a_worker_that_is_killed(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, main = module.kept_pair, os.getpid()

    def deadly(source: Any, index: int, images: Any) -> Any:
        if index == 23 and os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return kept(source, index, images)

    monkeypatch.setattr(module, "kept_pair", deadly)
    with pytest.raises(RunStopped, match="A process that packs has died"):
        pack([str(pairs)], tmp_path / "out", Data(), shard_pairs=5, workers=2)
    result = pack([str(pairs)], tmp_path / "out", Data(), shard_pairs=5, workers=0)
    assert result["written"] <= 4 + 2
    pack([str(pairs)], tmp_path / "whole", Data(), shard_pairs=5, workers=0)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    add = tarfile.TarFile.addfile

    def full(self: Any, member: tarfile.TarInfo, file: Any) -> None:
        if member.name.startswith("k13"):
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, member, file)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", full)
        with pytest.raises(OSError, match="No space left") as error:
            pack([str(pairs)], tmp_path / "out", Data(), shard_pairs=5, workers=workers)
    assert error.value.errno == errno.ENOSPC
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.startswith((".", "00002"))]
    assert pack([str(pairs)], tmp_path / "out", Data(), shard_pairs=5)["pairs"] == 40


def test_verify_and_mend(tmp_path: Path) -> None:
    rows = [pair(n) if n % 7 else {**pair(n), "image": b"x"} for n in range(30)]
    source, out = [str(write_pairs(tmp_path / "a.parquet", rows))], tmp_path / "out"
    pack(source, out, Data(), shard_pairs=8, workers=0)
    before = content(out)
    assert verify(out)["whole"]
    assert pack(source, out, Data(), shard_pairs=8, workers=0)["written"] == 0
    (out / "00000.tar").unlink()
    data = bytearray((out / "00002.tar").read_bytes())
    data[1000] ^= 1
    (out / "00002.tar").write_bytes(data)
    (out / "more.tar").write_bytes(data)
    found = verify(out)
    assert (found["missing"], found["changed"], found["additional"], found["whole"]) == (
        ["00000.tar"], ["00002.tar"], ["more.tar"], False
    )  # fmt: skip
    for name in ("00002.tar", "more.tar"):
        (out / name).unlink()
    assert pack(source, out, Data(), shard_pairs=8, workers=0)["written"] == 2
    assert content(out) == before


def test_refusals(pairs: Path, tmp_path: Path) -> None:
    source, out = [str(pairs)], tmp_path / "out"
    pack(source, out, Data(), workers=0)
    with pytest.raises(InputError, match=r"holds a pack of other data or with other options \(resize\): give another"):
        pack(source, out, Data(), resize=9, workers=0)
    with pytest.raises(InputError, match=r"\(data, source_pairs, sample\)"):
        pack([*source, "demo:noto"], out, Data(), workers=0)
    write_pairs(pairs, [pair(number + 1) for number in range(40)])
    with pytest.raises(InputError, match=r"\(sample, files\)"):
        pack(source, out, Data(), workers=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text('{"name": "somebody\'s"}')
    with pytest.raises(InputError, match="already holds files"):
        pack(source, tmp_path / "mine", Data(), workers=0)
    with pytest.raises(InputError, match=r"was not written by `declip data pack`"):
        verify(tmp_path / "mine")
    with pytest.raises(InputError, match="quality is 0"):
        pack(source, tmp_path / "new", Data(), quality=0)
    broken = write_pairs(tmp_path / "b.parquet", [{**pair(n), "image": b"x"} for n in range(3)])
    with pytest.raises(InputError, match=r"every pair is broken, the first .*b\.parquet, row 0: no known image format"):
        pack([str(broken)], tmp_path / "none", Data(), workers=0)
    with pytest.raises(InputError, match="is not finished"):
        verify(tmp_path / "none")


def test_a_shard_of_broken_pairs_is_an_empty_one(tmp_path: Path) -> None:
    rows = [pair(n) if n > 4 else {**pair(n), "image": b"x"} for n in range(9)]
    pack([str(write_pairs(tmp_path / "a.parquet", rows))], tmp_path / "out", Data(), shard_pairs=4, workers=0)
    source = open_sources([str(tmp_path / "out")], Data())
    assert [source.key(i) for i in range(len(source))] == ["k5", "k6", "k7", "k8"]


def test_open_clip_reads_it(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    gif = {**pair(40), "key": "v1.2/x.gif", "image": IMAGES["animated"][0]}
    path = write_pairs(tmp_path / "a.parquet", [*(pair(number) for number in range(40)), gif])
    pack([str(path)], tmp_path / "out", Data(), shard_pairs=16, workers=0)
    pipeline = wds.DataPipeline(  # as open_clip_train has it
        wds.SimpleShardList(f"{tmp_path}/out/{{00000..00002}}.tar"),
        wds.tarfile_to_samples(),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.to_tuple("image", "text"),
    )
    source = open_sources([str(path)], Data())
    read = list(pipeline)
    assert [text for _, text in read] == [source.captions(i)[0] for i in range(41)]
    for i, (image, _) in enumerate(read):
        assert np.array_equal(np.asarray(image), decode_image(source[i].image))
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {
        "00000.tar": 16, "00001.tar": 16, "00002.tar": 9
    }  # fmt: skip


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def test_from_a_server(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    (tmp_path / "far").mkdir()
    for number in range(3):
        rows = [pair(10 * number + n) for n in range(10)]
        pack([str(write_pairs(tmp_path / "a.parquet", rows))], tmp_path / f"{number}", Data(), workers=0)
        (tmp_path / f"{number}" / "00000.tar").rename(tmp_path / "far" / f"{number}.tar")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path / "far")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{{0..2}}.tar"
    result = pack([url], tmp_path / "out", Data(index_folder=str(tmp_path / "cache")), shard_pairs=7, workers=2)
    server.shutdown()
    assert (result["pairs"], result["shards"]) == (30, 5)
    source = open_sources([str(tmp_path / "out")], Data())
    assert [source[i].image for i in range(30)] == [picture(i) for i in range(30)]


def test_what_is_printed(tmp_path: Path) -> None:
    rows = [pair(0), {**pair(1), "image": b"[red]x"}]
    result = pack([str(write_pairs(tmp_path / "a.parquet", rows))], tmp_path / "[b]", Data(), workers=0)
    console = Console(file=io.StringIO(), width=300)
    print_packed(result, console)
    print_verified(verify(tmp_path / "[b]"), console)
    print_verified({**verify(tmp_path / "[b]"), "changed": ["00000.tar"], "whole": False}, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"1 of 2 pairs in 1 shard, 0.0 MB: {tmp_path}/[b]\nleft out: 1, no known image format" in said
    assert "1 shard with 1 pair: all as they were written.\nchanged: 00000.tar\nDelete" in said


def test_another_source_is_noticed_wherever_it_differs(tmp_path: Path) -> None:
    rows = [pair(number) for number in range(40)]
    named = write_pairs(tmp_path / "a.parquet", rows)
    pack([str(named)], tmp_path / "out", Data(), workers=0)
    rows[33]["captions"] = ["another one"]
    write_pairs(named, rows)
    with pytest.raises(InputError, match=r"holds a pack of other data"):
        pack([str(named)], tmp_path / "out", Data(), workers=0)


def test_an_index_that_is_damaged_is_found(pairs: Path, tmp_path: Path) -> None:
    pack([str(pairs)], tmp_path / "out", Data(), workers=0)
    index = tmp_path / "out" / "00000.tar.index"
    source = open_sources([str(tmp_path / "out")], Data())
    at = source.indexed[0].file.read_bytes().index((512).to_bytes(8, "little"))  # type: ignore[attr-defined]
    data = bytearray(index.read_bytes())
    data[at + 1] ^= 4
    index.write_bytes(data)
    assert verify(tmp_path / "out")["changed"] == ["00000.tar.index"]
    index.unlink()
    assert verify(tmp_path / "out")["whole"]


@pytest.mark.parametrize("manifest", ['{"format": "declip pack 1"}', "[]", '{"format": "declip pack 1", "shards": 3}'])
def test_a_manifest_of_something_else(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match="holds no manifest"):
        verify(tmp_path)
