"""Pairs of a batch with equal captions: false negatives, kept apart, or positives - what measures better.

    python benchmarks/equal_captions.py [--seeds 3] [--jobs 2] [--json]

emoji: each name is drawn by two artists, with the same captions (Noto and Twemoji); a fifth of the pairs is held out,
score: its retrieval, mean of both directions. classes: CIFAR-10's training subset with the class names as captions, of
which a batch of 256 has 26 equal each; score: zero-shot on the dev subset. flickr8k: a quarter of train, where equal
captions are rare, so that nothing should change; score: retrieval of a tenth held out.
Finished cells are kept under --work, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

APART, POSITIVES = "data.keep_apart=captions", "terms.contrastive.equal_captions=positives"
NEGATIVES = "terms.contrastive.equal_captions=negatives"
WAYS = {
    "negatives": [NEGATIVES],
    "kept apart": [NEGATIVES, APART],
    "positives": [POSITIVES],
    "kept apart and positives": [POSITIVES, APART],
}
METHODS = {"CLIP": "clip", "DeCLIP": "declip"}
HELD_OUT = ["evaluation.every=0.25", "data.holdout=0.2"]
SETS: dict[str, list[str]] = {
    "emoji": ['data.train=["demo:noto","demo:twemoji"]', "schedule.pairs_seen=24000", *HELD_OUT],
    "classes": [
        "data.train={shared}/data/cifar10_train.parquet",
        "data.captions=class_name",
        "data.holdout=0",
        "schedule.pairs_seen=48000",
        "data.images.flip=0.5",
    ],
    "flickr8k": [
        "data.train={shared}/data/flickr8k_train.parquet",
        "schedule.pairs_seen=24000",
        "data.fraction=0.25",
        "data.images.flip=0.5",
        *HELD_OUT,
    ],
}


class Cell(NamedTuple):
    """One training run."""

    data: str
    method: str
    way: str
    seed: int


def run(cell: Cell, shared: str, work: Path) -> float:
    """Train and judge, unless the score is there already."""
    from declip.recipe import load_recipe, to_toml

    options = [option.format(shared=shared) for option in SETS[cell.data]]
    recipe = load_recipe(METHODS[cell.method], [*options, *WAYS[cell.way], f"seed={cell.seed}", "data.workers=0"])
    key = hashlib.sha256(to_toml(recipe).encode()).hexdigest()[:16]
    stored = work / f"{key}.json"
    if stored.is_file():
        return float(json.loads(stored.read_text()))
    import shutil

    import torch

    from declip.evaluation import evaluate
    from declip.pairs import Data
    from declip.training.logging import read_metrics
    from declip.training.loop import train

    torch.set_num_threads(1)
    out = work / key
    shutil.rmtree(out, ignore_errors=True)
    train(recipe, out, quiet=True)
    if cell.data == "classes":
        test = f"{shared}/data/cifar10_dev.parquet"
        found = evaluate(str(out), [test], ["zero-shot"], Data(), None, ["{}"])
        score = found["results"][0]["metrics"]["top1"]
    else:
        score = max(row["held_out"]["score"] for row in read_metrics(out) if "held_out" in row)
    stored.write_text(json.dumps(score))
    shutil.rmtree(out, ignore_errors=True)
    return float(score)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shared", default="../shared", help="folder that holds data/*.parquet")
    parser.add_argument("--work", type=Path, default=Path("runs/equal_captions"), help="where finished cells are kept")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    # keeping apart is nothing for ten captions in batches of 256
    cells = [
        Cell(data, method, way, seed)
        for seed, data, method, way in product(range(args.seeds), args.sets, args.methods, WAYS)
        if not (data == "classes" and APART in WAYS[way])
    ]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        scores = dict(
            zip(cells, pool.map(run, cells, [args.shared] * len(cells), [args.work] * len(cells)), strict=True)
        )
    rows: list[dict[str, Any]] = []
    for data, method, way in dict.fromkeys(cell[:3] for cell in cells):
        mine = [scores[cell] for cell in cells if cell[:3] == (data, method, way)]
        spread = statistics.stdev(mine) if len(mine) > 1 else 0.0
        rows.append({"set": data, "method": method, "way": way, "mean": statistics.mean(mine), "sd": spread})
        rows[-1]["by_seed"] = mine
        print(f"| {data} | {method} | {way} | {rows[-1]['mean']:.1f} ± {spread:.1f} |", file=sys.stderr)
    if args.json:
        print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
