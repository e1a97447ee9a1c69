"""What data.augment_on = "device" saves a loader process, and what it costs the training device.

    python benchmarks/device_views.py [--sizes 64,224] [--device auto] [--batch 256] [--rounds 5] [--json] [--check]

Recipe declip-vit-b32: two views of a pair with crop, colour jitter, grayscale, blur and flip, from JPEG files of 500 x
375 pixels. worker: a batch is made in this process, on one thread, as a loader process makes it (views and captions);
the pictures decoded anew for every pair, or kept decoded in memory. device: its views are finished in one go. All take
turns; medians of the rounds. apart: grey levels between the views of either path.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from declip.data.decoded import Images, open_images
from declip.data.device_views import finish_views
from declip.data.loader import BatchMaker
from declip.data.sources import open_sources
from declip.recipe import load_recipe
from declip.training.loop import pick_device

SAVED_SHARE, MEAN_APART = 0.4, 0.5  # of a worker's time at the largest size, at least; grey levels, at most


def write_pairs(path: Path, pairs: int) -> None:
    rng = np.random.default_rng(0)
    images = []
    for _ in range(pairs):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
        noisy = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noisy).save(stream, "JPEG", quality=90)
        images.append(stream.getvalue())
    captions = [f"a photo of thing number {number} among others" for number in range(pairs)]
    pq.write_table(pa.table({"image": images, "caption": captions}), path)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """CPU time on a CPU, which other programs do not lengthen; wall-clock time until another device is done."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    wait()
    begun = clock()
    function()
    wait()
    return clock() - begun


def measure(path: Path, size: int, batch_size: int, rounds: int, device: torch.device) -> dict[str, float]:
    """The figures of views of one size."""
    makers = {}
    for where in ("worker", "device"):
        fields = [f"data.train={str(path)!r}", f"schedule.batch_size={batch_size}", f"data.augment_on={where}"]
        recipe = load_recipe("declip-vit-b32", fields)
        source = open_sources(recipe.data.train, recipe.data)
        makers[where] = BatchMaker(Images(source, None), recipe, size, 77)
        makers[f"{where}_kept"] = BatchMaker(open_images(source, 1e3, 0), recipe, size, 77)
    crops = makers["device"].make(0)
    sent = crops.to(device)
    finished = finish_views(sent).images.cpu()  # which also warms up
    levels = (finished.int() - makers["worker"].make(0).images.int()).abs()
    times: dict[str, list[float]] = {name: [] for name in (*makers, "finish")}
    for number in range(rounds):
        for name, maker in makers.items():
            times[name].append(seconds(partial(maker.make, number), torch.device("cpu")))
        times["finish"].append(seconds(partial(finish_views, sent), device))
    per_pair = {name: 1000 * statistics.median(values) / batch_size for name, values in times.items()}
    views = len(crops.images)
    return {
        "size": size,
        "views": views,
        "worker_milliseconds_per_pair": per_pair["worker"],
        "worker_milliseconds_per_pair_crops_only": per_pair["device"],
        "worker_milliseconds_per_kept_pair": per_pair["worker_kept"],
        "worker_milliseconds_per_kept_pair_crops_only": per_pair["device_kept"],
        "share_saved": 1 - per_pair["device"] / per_pair["worker"],
        "share_saved_kept": 1 - per_pair["device_kept"] / per_pair["worker_kept"],
        "device_milliseconds_per_image": per_pair["finish"] / views,
        "mean_apart": float(levels.float().mean()),
        "most_apart": int(levels.max()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="64,224", help="sides of the views in pixels (%(default)s)")
    parser.add_argument("--device", default="auto", help="where views are finished (%(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="pairs a batch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="batches that are timed (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object on stdout")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.parquet"
        write_pairs(path, 2 * args.batch)
        sizes = [measure(path, int(size), args.batch, args.rounds, device) for size in args.sizes.split(",")]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result = {"device": name, "batch": args.batch, "rounds": args.rounds, "sizes": sizes}
    if args.json:
        print(json.dumps(result))
    else:
        for figures in sizes:
            print(f"views of {figures['size']} pixels, finished on {name}")
            print(*(f"  {key} = {value:.4g}" for key, value in figures.items()), sep="\n")
    met = {
        "saved": max(sizes, key=lambda figures: figures["size"])["share_saved"] >= SAVED_SHARE,
        "same views": all(figures["mean_apart"] < MEAN_APART for figures in sizes),
    }
    missed = [name for name, kept in met.items() if not kept]
    print(f"missed: {', '.join(missed) or 'none'}", file=sys.stderr)
    return int(args.check and bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
