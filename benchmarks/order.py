"""Order and index at scale: time, memory, and how well the pairs are shuffled.

    python benchmarks/order.py [--pairs 100000000] [--shard-pairs 10000] [--tar-pairs 1000000] [--json] [--check]

order: a process of its own makes the order of a set in shards, goes to a batch in the middle of the third epoch as a
resumed run does, and makes 1,000 batches. Rank correlation with storage order is taken over a whole epoch of a
hundredth of the pairs. index: tar shards of synthetic pairs (a picture of 1 kB, a caption) are written to a temporary
folder, indexed, and opened again, and the loader's whole path is run over an epoch of them, whose ids are counted.
index_memory: a set of `--pairs` pairs, of which the shards are one file under many names and each index is a file of
its own; four processes read a thousand batches in the loader's order. Memory is their proportional share (PSS), index
pages included, above that of four processes without a set.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESUME_SECONDS, MEMORY_GB, CORRELATION, INDEX_SECONDS, FIRST_BATCH_SECONDS = 2.0, 1.0, 0.02, 60.0, 3.0


def resident_gb() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**30


def measure_order(pairs: int, shard_pairs: int) -> dict[str, Any]:
    from declip.data.order import Order

    shards = np.minimum(np.arange(-(-pairs // shard_pairs) + 1) * shard_pairs, pairs)
    before, start = resident_gb(), time.perf_counter()
    order = Order(pairs, 256, 0, shards)
    middle = int(2.5 * pairs / 256)
    order.batch(middle)
    resumed = time.perf_counter() - start
    for number in range(middle, middle + 1000):
        order.batch(number)
    batch = (time.perf_counter() - start - resumed) / 1000
    part = pairs // 100
    small = Order(part, 256, 0, np.append(shards[shards < part], part))
    epoch = small.at(np.arange(part))
    return {
        "pairs": pairs,
        "shards": len(shards) - 1,
        "resume_seconds": resumed,
        "batch_milliseconds": 1000 * batch,
        "memory_gb": resident_gb() - before,
        "rank_correlation": abs(float(np.corrcoef(epoch, np.arange(part))[0, 1])),
        "all_once": len(np.unique(epoch)) == part,
    }


def write_shards(folder: Path, pairs: int, per_shard: int) -> None:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(stream, "PNG")
    image = stream.getvalue()
    for first in range(0, pairs, per_shard):
        with tarfile.open(folder / f"{first // per_shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(first, min(first + per_shard, pairs)):
                for suffix, data in ((".png", image), (".txt", f"picture number {number}".encode())):
                    member = tarfile.TarInfo(f"{number:09d}{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def measure_index(folder: Path, pairs: int) -> dict[str, Any]:
    from declip.data.decoded import Images
    from declip.data.loader import BatchMaker, make_loader
    from declip.data.sources import open_sources
    from declip.recipe import load_recipe

    recipe = load_recipe("clip", [f"data.train={str(folder)!r}", "schedule.batch_size=256"])
    start = time.perf_counter()
    open_sources(recipe.data.train, recipe.data)
    indexed = time.perf_counter() - start
    start = time.perf_counter()
    source = open_sources(recipe.data.train, recipe.data)
    maker = BatchMaker(Images(source, None), recipe, 16, 77)
    steps = 2 * -(-pairs // 256)
    loader = make_loader(maker, 0, steps, 8)
    batch = next(loader)
    first = time.perf_counter() - start
    seen = [batch.sample_ids.numpy()]
    while 256 * len(seen) < pairs:
        seen.append(next(loader).sample_ids.numpy())
    counts = np.bincount(np.concatenate(seen)[:pairs], minlength=pairs)
    return {
        "pairs": pairs,
        "index_seconds": indexed,
        "first_batch_seconds": first,
        "lost": int((counts == 0).sum()),
        "doubled": int((counts > 1).sum()),
        "pairs_per_second_8_workers": pairs / (time.perf_counter() - start),
    }


PROCESSES = 4


def proportional_gb() -> float:
    """Memory of this process, pages that several share divided among them."""
    (line,) = (line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) / 2**20


def together_gb(work: Callable[[int], object]) -> float:
    """Memory of some processes after `work`, all still alive."""
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(PROCESSES), context.Queue()

    def run(number: int) -> None:
        work(number)
        barrier.wait()
        found.put(proportional_gb())
        barrier.wait()

    processes = [context.Process(target=run, args=(number,)) for number in range(PROCESSES)]
    for process in processes:
        process.start()
    total = sum(found.get() for _ in processes)
    for process in processes:
        process.join()
    return total


def measure_index_memory(folder: Path, pairs: int, per_shard: int) -> dict[str, Any]:
    from declip.data.order import Order
    from declip.data.sources import open_sources
    from declip.pairs import Data

    write_shards(folder, per_shard, per_shard)
    open_sources([str(folder)], Data())
    first = folder / "00000.tar"
    index = (folder / "00000.tar.index").read_bytes()
    for number in range(1, pairs // per_shard):
        (folder / f"{number:05d}.tar").hardlink_to(first)
        (folder / f"{number:05d}.tar.index").write_bytes(index)
    without = together_gb(lambda number: None)
    before, start = resident_gb(), time.perf_counter()
    source = open_sources([str(folder)], Data())
    order = Order(len(source), 256, 0, source.shards)
    opened, own = time.perf_counter() - start, resident_gb() - before

    def read(number: int) -> None:
        for batch in range(number, 1000, PROCESSES):
            for index in order.batch(batch).tolist():
                source[index]

    return {
        "pairs": len(source),
        "index_files_gb": len(index) * (pairs // per_shard) / 2**30,
        "open_seconds": opened,
        "opening_process_gb": own,
        "reading_processes_gb": together_gb(read) - without,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100_000_000)
    parser.add_argument("--shard-pairs", type=int, default=10_000)
    parser.add_argument("--tar-pairs", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    args = parser.parse_args()
    results = {"order": measure_order(args.pairs, args.shard_pairs)}
    results["order_one_shard"] = measure_order(args.pairs, args.pairs)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), args.tar_pairs, args.shard_pairs)
        results["index"] = measure_index(Path(folder), args.tar_pairs)
    with tempfile.TemporaryDirectory() as folder:
        results["index_memory"] = measure_index_memory(Path(folder), args.pairs, args.shard_pairs)
    if args.json:
        print(json.dumps(results))
    else:
        for name, figures in results.items():
            print(name, *(f"  {key} = {value:.6g}" for key, value in figures.items()), sep="\n")
    order, index, memory = results["order"], results["index"], results["index_memory"]
    met = {
        "resume": order["resume_seconds"] <= RESUME_SECONDS,
        "memory": order["memory_gb"] + memory["opening_process_gb"] + memory["reading_processes_gb"] <= MEMORY_GB,
        "shuffle": order["rank_correlation"] < CORRELATION and order["all_once"],
        "index": index["index_seconds"] <= INDEX_SECONDS,
        "first batch": index["first_batch_seconds"] <= FIRST_BATCH_SECONDS,
        "none lost or doubled": index["lost"] == index["doubled"] == 0,
    }
    missed = [name for name, kept in met.items() if not kept]
    print(f"missed: {', '.join(missed) or 'none'}", file=sys.stderr)
    return int(args.check and bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
