"""Retrieval figures beside clip_benchmark's: time and memory at 25,000 captions, and of a million images and texts.

    python benchmarks/retrieval.py [--only captions] [--json] [--check]

captions: 25,000 captions of 5,000 images, width 512. Recall at 1, 5 and 10 both ways from embeddings: `declip` in
one call, clip_benchmark as its `evaluate` computes them, 64 queries at a time. Seconds by turns, peak memory over the
start in a process of its own. Recalls must be equal; declip counts what ties within 1e-6 against the model, which
the embeddings drawn here leave without effect.

million: ranks of 1,000 sampled images and their captions among a million images and a million texts, width 512 in half
precision: peak memory of the whole process, embeddings included, and seconds.

Needs an otherwise idle computer, and 16 GB for clip_benchmark's score matrices.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
from torch import Tensor
from torch.nn.functional import normalize

from declip.evaluation.retrieval import RECALL_AT, retrieval_metrics, retrieval_ranks

IMAGES, CAPTIONS, WIDTH = 5000, 5, 512
FASTER = 5.0  # at least: clip_benchmark's seconds over ours
MILLION_GB = 4.0  # at most: peak memory of the process
MILLION, QUERIES = 1_000_000, 1000
THEIR_BATCH = 64  # queries at once, clip_benchmark's default batch of images
NAMES = ["captions", "million"]


def embeddings() -> tuple[Tensor, Tensor, Tensor]:
    """Images at random and captions near enough that half of them find their image."""
    generator = torch.Generator().manual_seed(0)
    images = normalize(torch.randn(IMAGES, WIDTH, generator=generator), dim=-1)
    owner = torch.arange(IMAGES).repeat_interleave(CAPTIONS)
    noise = torch.randn(len(owner), WIDTH, generator=generator) / WIDTH**0.5
    return images, normalize(images[owner] + 6 * noise, dim=-1), owner


def theirs(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float]:
    """The lines of clip_benchmark's `evaluate` after the embeddings, with its functions."""
    scores = texts @ images.t()
    right = torch.zeros_like(scores, dtype=torch.bool)
    right[torch.arange(len(scores)), owner] = True
    found = {}
    for k in RECALL_AT:
        for way, table, positive in (("text_to_image", scores, right), ("image_to_text", scores.T, right.T)):
            hits = batchify(recall_at_k, table, positive, THEIR_BATCH, "cpu", k=k) > 0
            found[f"{way}_r{k}"] = 100 * int(hits.sum()) / len(hits)
    return found


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], dict[str, float]]] = {
    "declip": retrieval_metrics,
    "clip_benchmark": theirs,
}


def case(name: str) -> dict[str, Any]:
    """One side, or the million, in this process: peak memory in GB, whole and over the start, and seconds."""
    if name == "million":
        images, texts = half_embeddings(0), half_embeddings(1)
        owner, queries = torch.arange(MILLION), torch.arange(0, MILLION, MILLION // QUERIES)
    else:
        data = embeddings()
    start, began = _reset_peak(), time.perf_counter()
    if name == "million":
        found: Any = [len(ranks) for ranks in retrieval_ranks(images, texts, owner, queries=queries).values()]
    else:
        found = SIDES[name](*data)
    took, peak = time.perf_counter() - began, _resident("VmHWM")
    return {"found": found, "peak_gb": peak / 2**20, "over_start_gb": (peak - start) / 2**20, "seconds": took}


def half_embeddings(seed: int) -> Tensor:
    """Random unit vectors, made a block at a time: no more than themselves in memory."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.empty(MILLION, WIDTH, dtype=torch.float16)
    for part in torch.split(made, 10_000):
        part.copy_(normalize(torch.randn(part.shape, generator=generator), dim=-1))
    return made


def _reset_peak() -> int:
    """Forget the peak of the imports; the memory held now, in KB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def alone(name: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--case", name], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure_captions(turns: int) -> dict[str, Any]:
    """Both sides by turns, each turn a process of its own."""
    rows = [{side: alone(side) for side in SIDES} for _ in range(turns)]
    seconds = {side: statistics.median(row[side]["seconds"] for row in rows) for side in SIDES}
    ours, others = (rows[0][side]["found"] for side in SIDES)
    return {
        "seconds": seconds,
        "over_start_gb": {side: max(row[side]["over_start_gb"] for row in rows) for side in SIDES},
        "faster": seconds["clip_benchmark"] / seconds["declip"],
        "recalls": others,
        "equal": all(ours[name] == value for name, value in others.items()),
        "turns": [{side: row[side]["seconds"] for side in SIDES} for row in rows],
    }


def missed_targets(found: dict[str, Any]) -> list[str]:
    missed = []
    if "captions" in found:
        missed += [] if found["captions"]["faster"] >= FASTER else ["captions: time"]
        missed += [] if found["captions"]["equal"] else ["captions: recalls differ"]
    if "million" in found and found["million"]["peak_gb"] > MILLION_GB:
        missed.append("million: memory")
    return missed


def report(found: dict[str, Any]) -> None:
    if "captions" in found:
        row = found["captions"]
        for side in SIDES:
            print(f"captions, {side}: {row['seconds'][side]:.2f} s, {row['over_start_gb'][side]:.2f} GB over the start")
        print(f"captions: {row['faster']:.1f} times as fast; recalls {'equal' if row['equal'] else 'DIFFER'}")
    if "million" in found:
        row = found["million"]
        print(
            f"million: peak {row['peak_gb']:.2f} GB, {row['over_start_gb']:.2f} over the embeddings, "
            f"{row['seconds']:.0f} s for {QUERIES:,} images and their captions"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--only", choices=NAMES, help="one measurement; by default both")
    parser.add_argument("--turns", type=int, default=3, help="of captions (%(default)s)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(case(args.case)))
        return 0
    measure = {"captions": lambda: measure_captions(args.turns), "million": lambda: alone("million")}
    found = {name: measure[name]() for name in ([args.only] if args.only else NAMES)}
    missed = missed_targets(found)
    if args.json:
        load = os.getloadavg()[0]
        print(json.dumps({**found, "threads": torch.get_num_threads(), "load": load, "missed": missed}))
    else:
        report(found)
        print("\n".join(f"MISSED {what}" for what in missed) or "All targets met.")
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
