"""The format of `declip data pack`: what a set costs as tar with an index, as parquet and as Arrow files.

    python benchmarks/pack_formats.py [--pairs 50000 20000] [--image-kb 20 100] [--repeats 3] [--json]

For each size of image a set of synthetic pairs (random bytes, as a JPEG's do not compress either, and two captions) is
written to a temporary folder in each format, as well as the format allows: tar shards of 10,000 pairs with their index,
parquet in row groups of 1,000 without compression or dictionaries, Arrow files in batches of 1,000. Then it is read by
our own sources. window: the loader's order, windows of 8,192 pairs of shuffled shards, as of a set that is far larger;
random: all over the set. first: from the disk, with whatever the source must first unpack; cold: from the disk again
(the kernel is told to drop the files); warm: once more. Rates are pairs a second of one process, medians of the
repeats, which go through the formats in turn; decoding, how many JPEGs of that size one process decodes, is what they
have to beat. memory: what two forked reader processes have gained together after an epoch (PSS): own, and with mapped
files.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from declip.data.decode import decode_image
from declip.data.order import Order
from declip.data.sources import Source, open_sources
from declip.pairs import Data

SHARD, GROUP, WINDOW, RANDOM = 10_000, 1000, 8192, 10_000
SCHEMA = pa.schema(
    [pa.field("key", pa.string()), pa.field("image", pa.binary()), pa.field("captions", pa.list_(pa.string()))]
)
READ_BY = {
    "tar": "webdataset, open_clip, img2dataset's users, tar itself",
    "parquet": "Hugging Face datasets, pandas, DuckDB; not open_clip",
    "arrow": "Hugging Face datasets, polars; not open_clip",
}

Row = dict[str, Any]


def rows(pairs: int, image_kb: float) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    for number in range(pairs):
        size = int(1000 * image_kb * rng.uniform(0.5, 1.5))
        captions = [f"a picture of thing number {number}", f"thing {number} seen from the other side"]
        yield {"key": f"{number:09d}", "image": rng.bytes(size), "captions": captions}


def shards(every: Iterator[Row], pairs: int) -> Iterator[tuple[int, Iterator[Row]]]:
    for number in range(-(-pairs // SHARD)):
        yield number, (next(every) for _ in range(min(SHARD, pairs - number * SHARD)))


def write_tar(folder: Path, every: Iterator[Row], pairs: int) -> None:
    for number, some in shards(every, pairs):
        with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in some:
                texts = {"json": json.dumps({"captions": row["captions"]}).encode(), "txt": row["captions"][0].encode()}
                for suffix, data in {"jpg": row["image"], **texts}.items():
                    member = tarfile.TarInfo(f"{row['key']}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    open_sources([str(folder)], Data())  # makes the indices


def groups(some: Iterator[Row]) -> Iterator[pa.Table]:
    while group := [row for row, _ in zip(some, range(GROUP), strict=False)]:
        yield pa.Table.from_pylist(group, SCHEMA)


def write_parquet(folder: Path, every: Iterator[Row], pairs: int) -> None:
    for number, some in shards(every, pairs):
        path = folder / f"{number:05d}.parquet"
        with pq.ParquetWriter(path, SCHEMA, compression="none", use_dictionary=False) as writer:
            for table in groups(some):
                writer.write_table(table, row_group_size=GROUP)


def write_arrow(folder: Path, every: Iterator[Row], pairs: int) -> None:
    for number, some in shards(every, pairs):
        with pa.OSFile(str(folder / f"{number:05d}.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for table in groups(some):
                writer.write_table(table)


FORMATS: dict[str, Callable[[Path, Iterator[Row], int], None]] = {
    "tar": write_tar, "parquet": write_parquet, "arrow": write_arrow
}  # fmt: skip


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def drop(folder: Path) -> None:
    """Have the kernel forget what it keeps of the files."""
    for path in files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # what is not written yet cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(source: Source, indices: np.ndarray) -> float:
    """Pairs a second."""
    start = time.perf_counter()
    total = sum(len(source[i].image) for i in indices.tolist())
    assert total
    return len(indices) / (time.perf_counter() - start)


def decoding(image_kb: float) -> float:
    """JPEGs a second, of about 0.28 bytes a pixel."""
    rng, side = np.random.default_rng(0), 16 * int((1000 * image_kb / 0.28) ** 0.5 / 16)
    coarse = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    buffer = io.BytesIO()
    noisy = (smooth + rng.normal(0, 6, (side, side, 1))).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(buffer, "JPEG", quality=85)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        decode_image(buffer.getvalue())
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times)


def measure_write(name: str, folder: Path, pairs: int, image_kb: float) -> dict[str, float]:
    start = time.perf_counter()
    for _ in rows(pairs, image_kb):
        pass
    made = time.perf_counter() - start
    FORMATS[name](folder, rows(pairs, image_kb), pairs)
    drop(folder)
    return {"write_seconds": time.perf_counter() - start - 2 * made, "bytes": size(folder)}


def measure_reads(folder: Path, cache: Path, seed: int) -> dict[str, float]:
    shutil.rmtree(cache, ignore_errors=True)
    drop(folder)
    data = Data(index_folder=str(cache))
    start = time.perf_counter()
    source = open_sources([str(folder)], data)
    found = {"open_seconds": time.perf_counter() - start}
    epoch = Order(len(source), 256, seed, source.shards, WINDOW).at(np.arange(len(source)))
    anywhere = np.random.default_rng(seed).permutation(len(source))[:RANDOM]
    found["window_first"] = read(source, epoch)
    for order, indices in (("window", epoch), ("random", anywhere)):
        del source  # what is mapped is not dropped
        gc.collect()
        for part in (folder, cache):
            drop(part)
        source = open_sources([str(folder)], data)
        found[f"{order}_cold"] = read(source, indices)
        found[f"{order}_warm"] = read(source, indices)
    found["cache_bytes"] = size(cache)
    return found


def pss() -> dict[str, int]:
    """Bytes of this process's memory, of shared ones its part: its own, and with mapped files."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    kept = {name: int(value.split()[0]) * 1024 for name, value in fields.items()}
    return {"own": kept["Pss_Anon"], "with_files": kept["Pss"]}


def reader(source: Source, indices: np.ndarray, barrier: Any, queue: Any) -> None:
    barrier.wait()
    before = pss()
    barrier.wait()
    read(source, indices)
    barrier.wait()
    after = pss()
    barrier.wait()
    queue.put({name: after[name] - before[name] for name in after})


def measure_memory(folder: Path, cache: Path) -> dict[str, float]:
    """In MB, of two processes that each read half of an epoch."""
    context = get_context("fork")
    barrier, queue = context.Barrier(2), context.SimpleQueue()
    source = open_sources([str(folder)], Data(index_folder=str(cache)))
    epoch = Order(len(source), 256, 0, source.shards, WINDOW).at(np.arange(len(source)))
    read(source, epoch[:10])  # Arrow's allocator takes its first memory
    readers = [context.Process(target=reader, args=(source, epoch[part::2], barrier, queue)) for part in range(2)]
    for process in readers:
        process.start()
    gained = [queue.get() for _ in readers]
    for process in readers:
        process.join()
    return {f"memory_mb_{name}": sum(one[name] for one in gained) / 1e6 for name in gained[0]}


def measure(pairs: int, image_kb: float, repeats: int) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as root:
        for name in FORMATS:
            (Path(root) / name).mkdir()
            results[name] = measure_write(name, Path(root) / name, pairs, image_kb)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in FORMATS}
        for repeat in range(repeats):
            for name in FORMATS:
                found[name].append(measure_reads(Path(root) / name, Path(root) / "cache", repeat))
        for name, several in found.items():
            results[name] |= {key: statistics.median(one[key] for one in several) for key in several[0]}
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # this process has memory to give back
                results[name] |= fresh.submit(measure_memory, Path(root) / name, Path(root) / "cache").result()
            results[name] |= {"decoding": decoding(image_kb), "read_by": READ_BY[name]}
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[50_000, 20_000])
    parser.add_argument("--image-kb", type=float, nargs="+", default=[20, 100])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = {
        f"{pairs:,} pairs of {image_kb:g} kB": measure(pairs, image_kb, args.repeats)
        for pairs, image_kb in zip(args.pairs, args.image_kb, strict=True)
    }
    if args.json:
        print(json.dumps(results))
    else:
        for what, formats in results.items():
            print(f"{what:16}", *(f"{name:>12}" for name in formats))
            for key in next(iter(formats.values())):
                if key != "read_by":
                    print(f"  {key:14}", *(f"{figures[key]:12,.6g}" for figures in formats.values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
