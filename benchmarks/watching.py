"""What it costs to look at a step that is logged (`declip.training.watch`), beside the whole step.

    python benchmarks/watching.py [--steps 30] [--json] [--check]

Runs of `declip train` in which every step is logged; of each the median time of a step and, in the same steps, of all
that is done for its row alone: looking at the features and the queue, the gradients' norms, reading the values. In a
real run that happens twice a second, or in every step where steps are longer than half a second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from declip.data.loader import BatchMaker
from declip.demo import TRAIN
from declip.recipe import load_recipe
from declip.training import loop
from declip.training.logging import RunLog
from declip.training.watch import Watch

SHARE = 0.01  # at most: of a step
CASES = {
    "declip, small towers, batch 128": ("declip", 128, ()),
    "declip, small towers, batch 256": ("declip", 256, ()),
    "clip, ViT-B/32 at 224 px, batch 32": ("clip", 32, ("model.name=ViT-B-32",)),
}


class Times:
    """Seconds of each step, and of watching it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.watching: list[float] = []
        self.now, self.began = 0.0, time.perf_counter()

    def timing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            self.now += time.perf_counter() - start
            return result

        return call

    def end(self, log: RunLog, row: dict[str, Any]) -> None:
        self.steps.append(time.perf_counter() - self.began - self.now)
        self.watching.append(self.now)
        self.now, self.began = 0.0, time.perf_counter()


def measure(name: str, batch_size: int, more: tuple[str, ...], steps: int, threads: int) -> dict[str, float]:
    fields = [f"data.train={TRAIN}", "data.holdout=0", "data.workers=0", "evaluation.every=1", *more]
    fields += ["engine.device=cpu", f"engine.threads={threads}", "engine.save_seconds=1e9"]
    fields += [f"schedule.batch_size={batch_size}", f"schedule.pairs_seen={(steps + 2) * batch_size}"]
    recipe, times = load_recipe(name, fields), Times()
    make, made = BatchMaker.make, []

    def made_before(maker: BatchMaker, number: int) -> Any:
        """Four batches, over and over: the loader is not what is timed."""
        if len(made) < 4:
            made.append(make(maker, number))
        return made[number % len(made)]

    patches = [mock.patch.object(Watch, part, times.timing(getattr(Watch, part))) for part in ("_look", "row")]
    patches += [mock.patch.object(Watch, "read_gradients", times.timing(Watch.read_gradients))]
    patches += [mock.patch.object(RunLog, "train", lambda log, row: times.end(log, row))]
    patches += [mock.patch.object(BatchMaker, "make", made_before), mock.patch.object(loop, "LOG_SECONDS", 0.0)]
    with tempfile.TemporaryDirectory() as folder:
        for patch in patches:
            patch.start()
        loop.train(recipe, Path(folder) / "run", quiet=True)
        mock.patch.stopall()
    # At first batches are made, and the queue is empty.
    step, watching = (statistics.median(seconds[6:]) for seconds in (times.steps, times.watching))
    return {"step_seconds": step, "watching_seconds": watching, "share": watching / step}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="of each run (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit with 1 where the target is missed")
    args = parser.parse_args()
    found = {name: measure(*case, args.steps, args.threads) for name, case in CASES.items()}
    missed = [name for name, row in found.items() if row["share"] >= SHARE]
    if args.json:
        print(json.dumps({"torch": torch.__version__, "target": SHARE, "cases": found, "missed": missed}))
    else:
        for name, row in found.items():
            times = f"{1e3 * row['watching_seconds']:.2f} ms of {1e3 * row['step_seconds']:.0f} ms"
            print(f"{name}: {times}, {row['share']:.2%} (below {SHARE:.0%})")
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
