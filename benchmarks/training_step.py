"""The training step beside open_clip's own `train_one_epoch`: the same towers, batches and CPU threads.

    python benchmarks/training_step.py                 both by turns, for three pairs of towers
    python benchmarks/training_step.py --check --json  the same as JSON; exit code 1 where the target is missed

Needs an otherwise idle computer. Batches are ready in memory, so nothing but the step is timed: open_clip's loop with
its model, loss and AdamW, and `declip train`'s loop with the recipe `clip`. Both compute in float32. Captions are words
drawn at random, as long as people's sentences about pictures (12 ± 4 words); in the last case as long as open_clip
allows, where nothing is won by not computing padding.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import open_clip
import torch
from peer_open_clip import build_peer
from rich.console import Console
from rich.table import Table

from declip.data.batch import Batch
from declip.demo import TRAIN
from declip.model.dual_encoder import NORMALIZATIONS
from declip.recipe import Recipe, load_recipe
from declip.training import loop

FASTER = 1.3  # at least: seconds of open_clip's step over ours, for captions of a common length
FIRST = 2  # steps of each turn that do not count
console = Console(stderr=True)


@dataclass(frozen=True)
class Case:
    name: str
    towers: tuple[str, ...]
    batch_size: int
    words: tuple[int, int]  # mean and spread of a caption's length
    counts: bool = True


SENTENCES, FULL = (12, 4), (90, 0)
CASES = [
    Case("small ResNet, 64 px", (), 128, SENTENCES),
    Case("ViT-B/32, 224 px", ("model.name=ViT-B-32",), 16, SENTENCES),
    Case("RN50, 224 px", ("model.name=RN50",), 8, SENTENCES),
    Case("ViT-B/32, 224 px, captions of 77 tokens", ("model.name=ViT-B-32",), 16, FULL, counts=False),
]


def recipe_of(case: Case, steps: int, threads: int) -> Recipe:
    fields = [f"data.train={TRAIN}", "data.holdout=0", "data.workers=0", "evaluation.every=1", *case.towers]
    fields += ["engine.device=cpu", "engine.precision=float32", f"engine.threads={threads}", "engine.save_seconds=1e9"]
    fields += [f"schedule.batch_size={case.batch_size}", f"schedule.pairs_seen={steps * case.batch_size}"]
    return load_recipe("clip", fields)


def batches(case: Case, recipe: Recipe, count: int) -> list[tuple[Batch, torch.Tensor, torch.Tensor]]:
    """Each as our loop takes it and as open_clip's does: normalised pixels and captions padded to the context."""
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    size = 224 if recipe.model.name else recipe.model.image.image_size
    mean, std = (torch.tensor(value).view(3, 1, 1) * 255 for value in NORMALIZATIONS["clip"])
    vocabulary = ["a", "dog", "runs", "over", "the", "green", "field", "while", "two", "children", "watch", "it"]
    made = []
    for _ in range(count):
        lengths = [max(3, round(draw.gauss(*case.words))) for _ in range(case.batch_size)]
        tokens = open_clip.SimpleTokenizer(context_length=77)(
            [" ".join(draw.choices(vocabulary, k=length)) for length in lengths]
        )
        images = torch.randint(256, (1, case.batch_size, size, size, 3), generator=generator, dtype=torch.uint8)
        longest = int((tokens != 0).sum(dim=1).max())
        ours = Batch(images, tokens[None, :, :longest].clone(), ("caption",), None, torch.arange(case.batch_size))
        made.append((ours, (images[0].permute(0, 3, 1, 2).float() - mean) / std, tokens))
    return made


class Turns:
    """Notes when each batch is asked for; everything from one to the next is a step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def pass_on(self, items: list[Any]) -> Iterator[Any]:
        asked = []
        for item in items:
            asked.append(time.perf_counter())
            yield item
        asked.append(time.perf_counter())
        self.seconds += [after - before for before, after in zip(asked[FIRST:], asked[FIRST + 1 :], strict=False)]


def run_open_clip(recipe: Recipe, made: list[Any], turns: Turns) -> None:
    from open_clip_train.train import train_one_epoch

    model, criterion, optimizer = build_peer(recipe)
    model.output_dict = True
    loader = turns.pass_on([(pixels, tokens) for _, pixels, tokens in made])
    count = {"num_batches": len(made), "num_samples": len(made) * recipe.schedule.batch_size}
    data = SimpleNamespace(set_epoch=lambda epoch: None, dataloader=_Counted(loader, **count))
    options = {"device": "cpu", "precision": "fp32", "distill": False, "accum_freq": 1, "skip_scheduler": False}
    options |= {
        "grad_clip_norm": recipe.optimizer.clip_norm,
        "horovod": False,
        "log_every_n_steps": 100,
        "wandb": False,
    }
    options |= {
        "batch_size": recipe.schedule.batch_size,
        "world_size": 1,
        "rank": 0,
        "local_rank": 0,
        "log_local": False,
    }
    args = SimpleNamespace(**options)
    train_one_epoch(model, {"train": data}, criterion, 0, optimizer, None, lambda step: None, None, args)


class _Counted:
    def __init__(self, batches: Iterator[Any], num_batches: int, num_samples: int) -> None:
        self.batches, self.num_batches, self.num_samples = batches, num_batches, num_samples

    def __iter__(self) -> Iterator[Any]:
        return self.batches


def run_declip(recipe: Recipe, made: list[Any], turns: Turns) -> None:
    ready = turns.pass_on([ours for ours, _, _ in made])
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(loop, "make_loader", return_value=ready):
        loop.train(recipe, Path(folder) / "run", quiet=True)


def compare(case: Case, steps: int, rounds: int, threads: int) -> dict[str, Any]:
    recipe = recipe_of(case, steps + FIRST, threads)
    made = batches(case, recipe, steps + FIRST)
    sides = {"open_clip": (run_open_clip, Turns()), "declip": (run_declip, Turns())}
    for _ in range(rounds):
        for run, turns in sides.values():
            torch.set_num_threads(threads)
            run(recipe, made, turns)
    seconds = {name: statistics.median(turns.seconds) for name, (_, turns) in sides.items()}
    ratio = seconds["open_clip"] / seconds["declip"]
    result = {"case": case.name, "batch_size": case.batch_size, **{f"{name}_seconds": s for name, s in seconds.items()}}
    console.print(f"{case.name}: {seconds['open_clip']:.3f} s and {seconds['declip']:.3f} s, {ratio:.2f} ×")
    return {**result, "ratio": round(ratio, 3), "met": ratio >= FASTER if case.counts else None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="steps that count in a turn (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    parser.add_argument("--check", action="store_true", help="exit code 1 where the target is missed")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    results = [compare(case, args.steps, args.rounds, args.threads) for case in CASES]
    if args.json:
        print(json.dumps({"torch": torch.__version__, "target": FASTER, "cases": results}))
    else:
        table = Table("towers", "batch", "open_clip, s a step", "declip, s a step", f"ratio (at least {FASTER})")
        for row in results:
            seconds = (f"{row[f'{name}_seconds']:.3f}" for name in ("open_clip", "declip"))
            table.add_row(row["case"], str(row["batch_size"]), *seconds, f"{row['ratio']:.2f}")
        Console().print(table)
    return int(args.check and any(row["met"] is False for row in results))


if __name__ == "__main__":
    sys.exit(main())
