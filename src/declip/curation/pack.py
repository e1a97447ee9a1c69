"""Pairs of any source as tar shards with an index each: fast to read at random, and open_clip's own format.

Why tar and not parquet or Arrow files, by `benchmarks/pack_formats.py` with 50,000 pairs of 20 kB: open_clip and
webdataset read it as it is. Two readers take 17 MB of memory, where Arrow files are mapped whole (1 GB), and parquet
needs a second, unpacked copy on the disk as well. From the disk it gives 8,500 pairs a second, three times as many as
the same process decodes, so that Arrow's 32,000 would gain little. The price is 14 % more room (3 % at 100 kB each).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from declip.curation.findings import counted
from declip.curation.processes import in_processes
from declip.curation.scan import short_reason
from declip.curation.shard import Images, Report, kept_pair, valid, write_shard
from declip.data.patterns import expand
from declip.data.sources import BrokenPair, Source, open_sources
from declip.data.sources.opening import UNFINISHED
from declip.data.sources.tar_index import index_writer
from declip.data.storage import Storage, is_remote
from declip.errors import InputError, first_line
from declip.files import check_unused, write_atomically
from declip.pairs import Data
from declip.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = "declip pack 1"
SHARD_BYTES = 2**28
"""Of a shard, about."""
SHARD_PAIRS = 10_000
"""Of a shard, at most."""

# Loaders that deal out whole shards, as open_clip's, need one a process: a small set has more and smaller ones.
_SHARDS, _FEWEST_PAIRS = 16, 1000
_SAMPLED_SHARDS, _SAMPLED_PAIRS = 4, 16  # few shards, as a remote one is fetched whole
_NAMES = ("image", "captions", "label", "key", "image_root", "templates")  # of Data, what pairs depend on


def pack(
    specs: Sequence[str],
    out: Path,
    data: Data,
    *,
    resize: int | None = None,
    quality: int = 90,
    shard_pairs: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write pairs to ``out/00000.tar``, …, in storage order, each shard with its index beside it.

    resize: images whose shorter side has more pixels are made smaller, to JPEGs of this quality; all others are kept
    byte for byte. shard_pairs: of a shard (default: as many as take about `shard_bytes`, at most SHARD_PAIRS, less in
    a small set). workers: processes (0: this one); their number changes nothing in the shards.

    Keys become names that a tar may hold, numbered where a shard has one twice; .json then has the key as it was. Every
    image is decoded once. Broken pairs are left out however many there are, and ``out/log/left-out.jsonl`` names each
    with the reason. ``out/manifest.json`` says what is there, with a SHA-256 of each shard. Stopped or killed at any
    point, the same call goes on with the shards that are not there; so it does where a shard is missing later.

    Returns ``{"data", "out", "source_pairs", "pairs", "left_out": {reason: count}, "shards", "bytes", "written"}``:
    `pairs` are those in the shards, and `written` is the number of shards that this call wrote. Raises InputError where
    a source cannot be read, every pair is broken, or `out` holds anything else; RunStopped where a process was killed.
    """
    _check(resize=resize, quality=quality, shard_pairs=shard_pairs, shard_bytes=shard_bytes)
    source = open_sources(specs, data, need_captions=False)
    images = Images(resize, quality)
    plan = _plan(specs, source, data, images, shard_pairs, shard_bytes)
    count = -(-len(source) // plan["shard_pairs"])
    names = [f"{number:0{max(5, len(str(count - 1)))}d}.tar" for number in range(count)]
    with _begun(out, plan):
        reports = _done(out)
        shards = _Shards(source, out, names, images, plan["shard_pairs"], RawArray(ctypes.c_int64, count + 1))
        todo = []
        for number, name in enumerate(names):
            report = reports.get(name)
            if report and _size(out / name) == report["bytes"]:
                shards.seen[number] = len(shards.indices(number))
            else:
                todo.append(number)
        for report in _written(shards, todo, workers, progress):
            reports[report["file"]] = report
        return _finished(out, plan, source, [reports[name] for name in names], len(todo))


def _check(resize: int | None, quality: int, shard_pairs: int | None, shard_bytes: int) -> None:
    for name, value in (("resize", resize), ("shard pairs", shard_pairs), ("shard bytes", shard_bytes)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: give a number of one or more.")
    if not 1 <= quality <= 100:
        raise InputError(f"quality is {quality}: give a number from 1 to 100.")


def _plan(
    specs: Sequence[str], source: Source, data: Data, images: Images, shard_pairs: int | None, shard_bytes: int
) -> dict[str, Any]:
    """What the shards depend on. A pack goes on only where all of this is as it was."""
    digest = hashlib.sha256()
    sizes = []
    for index in _sampled(source.shards).tolist():
        digest.update(json.dumps([source.key(index), source.captions(index)]).encode())
        try:
            pair, image, _ = kept_pair(source, index, images)
        except BrokenPair as error:
            digest.update(error.reason.encode("utf-8", "replace"))
        else:
            digest.update(pair.image)
            sizes.append(len(image))
    if shard_pairs is None:
        fitting = int(shard_bytes / np.mean(sizes)) if sizes else SHARD_PAIRS
        small = max(_FEWEST_PAIRS, -(-len(source) // _SHARDS))
        shard_pairs = max(1, min(fitting, SHARD_PAIRS, small))
    return {
        "format": FORMAT,
        "data": [valid(str(spec)) for spec in specs],
        "columns": data.model_dump(mode="json", include=set(_NAMES)),
        "source_pairs": len(source),
        "sample": digest.hexdigest(),
        "files": _versions(specs, data),
        "resize": images.resize,
        "quality": images.quality,
        "shard_pairs": shard_pairs,
    }


def _versions(specs: Sequence[str], data: Data) -> str:
    """What changes when a file of the sources changes, but for images that a table only names."""
    storage, digest = Storage.of(data), hashlib.sha256()
    for path in (path for spec in specs if not spec.startswith("demo:") for path in expand(spec)):
        files = [path]
        if is_remote(path) and not os.path.splitext(path)[1]:
            files = storage.files_in(path)
        elif not is_remote(path) and os.path.isdir(path := os.path.expanduser(path)):
            files = sorted(os.path.join(place, name) for place, _, names in os.walk(path) for name in names)
        for file in files:
            if not file.endswith(".index"):  # they are made beside the shards
                digest.update(f"{file} {storage.version(file)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _sampled(shards: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of some pairs, spread over a few shards of the source."""
    chosen = np.unique(np.linspace(0, len(shards) - 2, _SAMPLED_SHARDS).astype(np.int64))
    parts = []
    for low, high in zip(shards[chosen].tolist(), shards[chosen + 1].tolist(), strict=True):
        parts.append(np.arange(low, high, max(1, -(-(high - low) // _SAMPLED_PAIRS))))
    return np.concatenate(parts)


@contextmanager
def _begun(out: Path, plan: dict[str, Any]) -> Iterator[None]:
    """The folder as this pack's alone. Raises InputError where it is another's."""
    unfinished = out / UNFINISHED
    found = read_json(unfinished) or read_json(out / "manifest.json")
    if found and found.get("format") == FORMAT:
        differs = [name for name in plan if found.get(name) != plan[name]]
        if differs:
            raise InputError(
                f"{out} holds a pack of other data or with other options ({', '.join(differs)}): give another folder, "
                "or delete it."
            )
    else:
        for path in out.glob(f".{UNFINISHED}.*.tmp"):  # of a process that was killed as soon as it began
            path.unlink(missing_ok=True)
        check_unused(out, "give another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not unfinished.exists():
            _write_json(unfinished, plan)
        (out / "log").mkdir(exist_ok=True)
    except PermissionError as error:
        raise InputError(f"{out} cannot be written to ({first_line(error)}): give another folder.") from None
    with unfinished.open("r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"Another process packs into {out}: wait for it.") from None
        for path in [*out.glob(".*.tmp"), *(out / "log").glob(".*.tmp")]:  # of a process that was killed
            path.unlink(missing_ok=True)
        yield


def _done(out: Path) -> dict[str, Report]:
    """The reports of the shards that have been written, by name."""
    reports: dict[str, Report] = {}
    for shard in (read_json(out / "manifest.json") or {}).get("shards", ()):
        reports[shard["file"]] = {**shard, "left_out": []}
    if reports and (log := out / "log" / "left-out.jsonl").exists():
        for row in map(json.loads, log.read_text("utf-8").splitlines()):
            reports[row["shard"]]["left_out"].append(row)
    for path in (out / "log").glob("*.tar.json"):
        if report := read_json(path):
            reports[report["file"]] = report
    return reports


@dataclass(frozen=True)
class _Shards:
    """Writes shards, in any process. seen: of each shard the pairs that were read, then whether to stop."""

    source: Source
    out: Path
    names: list[str]
    images: Images
    shard_pairs: int
    seen: Any

    def indices(self, number: int) -> range:
        return range(number * self.shard_pairs, min((number + 1) * self.shard_pairs, len(self.source)))

    def write(self, number: int, tick: Callable[[], None] | None = None) -> Report:
        def seen() -> None:
            if self.seen[-1]:
                raise InterruptedError
            self.seen[number] += 1
            if tick:
                tick()

        path = self.out / self.names[number]
        report = write_shard(path, self.source, self.indices(number), self.images, seen)
        index = index_writer(str(path), path, Storage.of(Data()).version(str(path)))
        write_atomically(Path(f"{path}.index"), index, several=True)
        _write_json(self.out / "log" / f"{path.name}.json", report)  # last: now the shard is done
        return report


def _worker(shards: _Shards, tick: Callable[[], None] | None) -> Callable[[int], Report]:
    return lambda number: shards.write(number, tick)


def _written(shards: _Shards, todo: list[int], workers: int, progress: Progress | None) -> Iterator[Report]:
    def tick() -> None:
        if progress:
            seen = np.frombuffer(shards.seen, np.int64)[:-1]
            progress("packing pairs", int(seen.sum()), len(shards.source))

    def stop() -> None:
        shards.seen[-1] = 1

    died = (
        "A process that packs has died. Where memory ran out, take fewer processes with --workers. The same command "
        "goes on from here."
    )
    if len(todo) == 1:
        workers = 0
    given = (shards, None if workers else tick)
    for report in in_processes(_worker, given, todo, workers, died=died, tick=tick, stop=stop):
        tick()
        yield report


def _finished(out: Path, plan: dict[str, Any], source: Source, reports: list[Report], written: int) -> dict[str, Any]:
    """Write what is known of the whole."""
    left_out = [row for report in reports for row in report["left_out"]]
    counts = dict(Counter(short_reason(row["reason"]) for row in left_out))
    pairs, size = (sum(report[name] for report in reports) for name in ("pairs", "bytes"))
    if not pairs:
        first = f"{left_out[0]['place']}: {left_out[0]['reason']}"
        raise InputError(f"Nothing of {source.name} can be packed: every pair is broken, the first {first}.")
    log = out / "log" / "left-out.jsonl"
    if left_out:
        rows = "".join(json.dumps(row) + "\n" for row in left_out)
        write_atomically(log, lambda temporary: temporary.write_text(rows, "utf-8"), several=True)
    shards = [{name: report[name] for name in ("file", "pairs", "bytes", "sha256")} for report in reports]
    _write_json(out / "sizes.json", {shard["file"]: shard["pairs"] for shard in shards})  # open_clip looks for it
    _write_json(out / "manifest.json", {**plan, "pairs": pairs, "left_out": counts, "shards": shards})
    for report in reports:
        (out / "log" / f"{report['file']}.json").unlink(missing_ok=True)
    if not left_out:
        with suppress(OSError):  # it holds somebody's files
            (out / "log").rmdir()
    (out / UNFINISHED).unlink()
    return {
        "data": plan["data"],
        "out": str(out),
        "source_pairs": plan["source_pairs"],
        "pairs": pairs,
        "left_out": counts,
        "shards": len(shards),
        "bytes": size,
        "written": written,
    }


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"), several=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """What a file holds; None where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}.") from None
    return value if isinstance(value, dict) else None


def print_packed(result: dict[str, Any], console: Console) -> None:
    """What was written, and what was left out."""
    console.print(
        f"{result['pairs']:,} of {counted(result['source_pairs'], 'pair')} in {counted(result['shards'], 'shard')}, "
        f"{result['bytes'] / 1e6:,.1f} MB: {result['out']}",
        highlight=False,
        markup=False,
    )
    for reason, count in result["left_out"].items():
        console.print(f"left out: {count:,}, {reason}", style="yellow", highlight=False, markup=False)
    if result["left_out"]:
        console.print(f"They are named in {result['out']}/log/left-out.jsonl.", highlight=False, markup=False)
