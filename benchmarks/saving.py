"""What a checkpoint costs the training that it interrupts.

    python benchmarks/saving.py [--model NAME --batch 32] [--steps 12] [--json] [--check]

Trains on the embedded pairs and saves before every fourth step. copy_ms: the training thread's own part, copying the
state to memory; write_ms: the rest, in the background. step_ms without and while_writing_ms with a write going on.
share: what checkpoints at the recipe's default pace (engine.save_seconds) take from training: the copy, and what steps
lose to the write beside them. Needs an otherwise idle computer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from declip.engine import Safety
from declip.recipe import load_recipe
from declip.training import loop, saving
from declip.training.checkpoint import checkpoints
from declip.training.guard import Guard
from declip.training.logging import RunLog

SHARE = 0.05  # at most: of the training time


def measure(options: list[str], steps: int, folder: Path) -> dict[str, Any]:
    recipe = load_recipe(
        "clip", [*options, "data.train=demo:noto", "data.holdout=0", "data.workers=1", "evaluation.every=1"]
    )
    recipe = recipe.model_copy(
        update={
            "schedule": recipe.schedule.model_copy(update={"pairs_seen": steps * recipe.schedule.batch_size}),
            "engine": recipe.engine.model_copy(update={"save_seconds": 1e9}),
        }
    )
    copies, writes, guards = [], [], []
    idle: list[float] = []
    busy: list[float] = []
    forward, taken, write = Guard.before_forward, Guard.step, saving.Saver._write
    current: list[loop.Run] = []
    begin = loop.Run.__init__

    def noted(run: loop.Run, *arguments: Any) -> None:
        begin(run, *arguments)
        current.append(run)

    def before_forward(guard: Guard) -> None:
        run = current[0]
        if run.step % 4 == 0 and run.step:
            start = time.perf_counter()
            run.save()
            copies.append(time.perf_counter() - start)
        guards.append((time.perf_counter(), run.saver.busy))
        forward(guard)

    def step(guard: Guard, *arguments: Any) -> str | None:
        reason = taken(guard, *arguments)
        start, writing = guards[-1]
        (busy if writing else idle).append(time.perf_counter() - start)
        return reason

    def timed(saver: saving.Saver, *arguments: Any) -> None:
        start = time.perf_counter()
        write(saver, *arguments)
        writes.append(time.perf_counter() - start)

    loop.Run.__init__ = noted  # type: ignore[method-assign]
    Guard.before_forward, Guard.step, saving.Saver._write = before_forward, step, timed  # type: ignore[method-assign]
    RunLog.train = lambda *_: None  # type: ignore[assignment, method-assign]
    loop.train(recipe, folder / "run", quiet=True)
    alone, beside = statistics.median(idle[1:]), statistics.median(busy[1:])
    copy, written = statistics.median(copies[1:]), statistics.median(writes[1:])
    lost = copy + max(0.0, written * (1 - alone / beside))
    return {
        "checkpoint_mb": checkpoints(folder / "run")[0].stat().st_size / 2**20,
        "step_ms": 1e3 * alone,
        "while_writing_ms": 1e3 * beside,
        "copy_ms": 1e3 * copy,
        "write_ms": 1e3 * written,
        "copy_share_of_a_step": copy / alone,
        "share": lost / Safety().save_seconds,
        "threads": torch.get_num_threads(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an open_clip architecture (default: the recipe's small towers)")
    parser.add_argument("--batch", type=int, default=64, help="pairs a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="how many (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit with 1 where the target is missed")
    args = parser.parse_args()
    options = [f"schedule.batch_size={args.batch}", *([f"model.name={args.model}"] if args.model else [])]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, args.steps, Path(folder))
    if args.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name}: {value:.4g}" for name, value in found.items()))
        print(f"At most {SHARE:.0%} of the training time: {'met' if found['share'] <= SHARE else 'MISSED'}")
    return 1 if args.check and found["share"] > SHARE else 0


if __name__ == "__main__":
    sys.exit(main())
