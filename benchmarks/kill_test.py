"""Kill a run with SIGKILL again and again: resumed, it must end as if nothing had happened, to the last bit.

    python benchmarks/kill_test.py [--kills 30] [--seed 0] [--json] [--check]

A run of 200 steps of tiny DeCLIP towers (queue, batch norm, patch dropout) that always has a checkpoint being written
is killed at random moments: while Python starts, between steps, in a step, in the middle of a write (counted by the
temporary file that is left). Runs that reach their end are compared with an undisturbed one, until there were enough
kills: finished files byte by byte, the last checkpoint's tensors bit by bit, and `metrics.jsonl` row by row.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from declip.training.checkpoint import checkpoints
from declip.training.logging import read_metrics

STEPS, TIMING = 200, ("seconds", "samples_per_second", "data_wait")
RECIPE = """
[data]
train = {data!r}
workers = 0
holdout = 0.2

[data.images]
jitter = 0.4
flip = 0.5

[model]
embed_dim = 16
patch_dropout = 0.5
image = {{ image_size = 32, layers = 1, width = 32, head_width = 32, patch_size = 8 }}
text = {{ context_length = 77, layers = 1, width = 32, heads = 1 }}

[terms.contrastive]
images = 2
texts = ["caption", "augmented"]

[terms.simsiam]
width = 32
bottleneck = 16

[terms.masked_language]

[terms.nearest_neighbour]
queue_size = 40

[schedule]
batch_size = 8
pairs_seen = {pairs}

[engine]
device = "cpu"
precision = "float32"
threads = 1
save_seconds = 0
"""


def write_recipe(folder: Path) -> Path:
    rng, rows = np.random.default_rng(0), []
    for number in range(60):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(buffer, "PNG")
        rows.append({"key": str(number), "image": buffer.getvalue(), "captions": [f"picture {number} of some"]})
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(data=str(folder / "pairs.parquet"), pairs=8 * STEPS))
    return path


def child(recipe: Path, out: Path) -> None:
    """Train, with every step in metrics.jsonl."""
    from declip.recipe import load_recipe
    from declip.training import loop

    loop.LOG_SECONDS = 0.0
    loop.train(load_recipe(recipe), out, resume=(out / "recipe.toml").is_file(), quiet=True)


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", str(recipe), str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def rows_written(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def kill_once(recipe: Path, out: Path, draw: random.Random) -> str:
    """Start or resume the run and kill it somewhere: "start", "write" or "other"; "end" where it was too late."""
    temporary = list((out / "checkpoints").glob(".*.tmp"))
    process = start(recipe, out)
    if draw.random() < 0.15:
        time.sleep(draw.uniform(0, 10))
    else:
        before, more = None, draw.randint(1, 12)
        while process.poll() is None:
            # Resuming drops rows first: what counts is what comes after.
            rows = rows_written(out)
            before = rows if before is None or rows < before else before
            if rows >= before + more:
                break
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
    process.kill()
    _, err = process.communicate()
    if process.returncode == 0:
        return "end"
    if process.returncode > 0:
        raise RuntimeError(f"The run failed by itself: {err}")
    left = [path for path in (out / "checkpoints").glob(".*.tmp") if path not in temporary]
    return "write" if left else "other" if rows_written(out) else "start"


def finish(recipe: Path, out: Path) -> None:
    process = start(recipe, out)
    _, err = process.communicate()
    if process.returncode:
        raise RuntimeError(f"The run failed by itself: {err}")


def tensors(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {name: leaf for key, item in value.items() for name, leaf in tensors(item, f"{path}.{key}").items()}
    if isinstance(value, list | tuple):
        return tensors(dict(enumerate(value)), path)
    return {path: value}


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in two finished runs."""
    found = [
        name
        for name in ("open_clip_model.safetensors", "declip_heads.safetensors", "checkpoints/best.safetensors")
        if (one / name).read_bytes() != (other / name).read_bytes()
    ]
    states = [tensors(torch.load(checkpoints(run)[0], weights_only=True)) for run in (one, other)]
    for name in sorted(states[0].keys() | states[1].keys()):
        ours, theirs = (state.get(name) for state in states)
        same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
        if not same and name not in (".progress.seconds", ".progress.peak_memory"):
            found.append(f"checkpoint{name}")
    rows = [[{k: v for k, v in row.items() if k not in TIMING} for row in read_metrics(run)] for run in (one, other)]
    if rows[0] != rows[1]:
        found.append("rows of metrics.jsonl")
    if [row["step"] for row in rows[1] if "loss" in row] != list(range(1, STEPS + 1)):
        found.append("steps in metrics.jsonl")
    return found


def measure(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    draw, recipe, whole = random.Random(seed), write_recipe(folder), folder / "whole"
    finish(recipe, whole)
    moments: list[str] = []
    runs, different = 0, []
    while len(moments) < kills:
        out, ended = folder / f"killed{runs}", False
        while len(moments) < kills and not ended:
            moment = kill_once(recipe, out, draw)
            ended = moment == "end"
            moments += [] if ended else [moment]
        if not ended:
            finish(recipe, out)
        different += [f"run {runs}: {what}" for what in differences(whole, out)]
        runs += 1
    counted = {name: moments.count(name) for name in ("start", "write", "other")}
    return {"kills": len(moments), **{f"in_{name}": n for name, n in counted.items()}, "runs": runs} | {
        "differences": different
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit with 1 where anything differs")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.kills, args.seed, Path(folder))
    if args.json:
        print(json.dumps(found))
    else:
        print(
            f"{found['kills']} kills in {found['runs']} runs of {STEPS} steps: {found['in_start']} before the first "
            f"step, {found['in_write']} in the middle of writing a checkpoint, {found['in_other']} elsewhere."
        )
        print("\n".join(f"DIFFERS {what}" for what in found["differences"]) or "All ended bit by bit as undisturbed.")
    return 1 if args.check and found["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
