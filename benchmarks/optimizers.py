"""The learning rate beside the batch, and optimizers beside AdamW, on held-out emoji.

    python benchmarks/optimizers.py --study batch --check    # four rates at batches of 32, 128 and 512
    python benchmarks/optimizers.py --study kinds --check    # AdamW, Muon and timm's LAMB, at the best of three rates
    python benchmarks/optimizers.py --study cost             # what a step of each costs, on an otherwise idle computer

Trained on Noto, judged once, at the end of the run, on Twemoji; an equal number of pairs seen. The score is the mean of
R@1, R@5 and R@10 of both directions. A ViT of 6 layers × 128 is trained beside the recipes' ResNet. Rates are chosen
with recipe clip and seed 0 and then serve declip and the other seeds. Finished runs are kept under --work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from declip.compare.quick import NAMES_AS_THEY_ARE
from declip.optimization import Optimizer

DATA = ('data.train=["demo:noto"]', 'data.validation=["demo:twemoji"]', "data.workers=0", "evaluation.every=1")
BATCHES, RATES, OWN = (32, 128, 512), (2.5e-4, 5e-4, 1e-3, 2e-3), 1e-3  # the recipe's rate is meant for 128
KINDS = {"adamw": (5e-4, 1e-3, 2e-3), "lamb": (2e-3, 5e-3, 1e-2), "muon": (1e-3, 2e-3, 4e-3)}
TOWERS = {"resnet": (), "vit": ("model.image.layers=6", "model.image.width=128", "model.image.patch_size=16")}


@dataclass(frozen=True)
class Cell:
    """One training run."""

    recipe: str
    towers: str
    kind: str
    batch: int
    lr: float
    pairs: int
    seed: int

    def overrides(self) -> list[str]:
        own = NAMES_AS_THEY_ARE if self.recipe == "declip" else []
        schedule = [f"schedule.batch_size={self.batch}", f"schedule.pairs_seen={self.pairs}"]
        rate = [f"optimizer.lr={self.lr}", "optimizer.lr_batch=0"]
        kind = ["optimizer.kind=muon"] if self.kind == "muon" else []
        return [*DATA, *own, *TOWERS[self.towers], *schedule, *rate, *kind, f"seed={self.seed}"]


def lamb(modules: list[nn.Module], options: Optimizer) -> torch.optim.Optimizer:
    from timm.optim.lamb import Lamb

    from declip.training.optimizer import parameter_groups

    groups, norm = parameter_groups(modules, options), options.clip_norm or None
    return Lamb(groups, lr=options.lr, betas=options.betas, eps=1e-6, max_grad_norm=norm, decoupled_decay=True)


def run_cell(cell: Cell, work: Path) -> dict[str, Any]:
    """Train one cell, unless its result is there already; one that diverges scores 0."""
    name = hashlib.sha256(json.dumps(asdict(cell), sort_keys=True).encode()).hexdigest()[:16]
    stored = work / f"{name}.json"
    if stored.is_file():
        result: dict[str, Any] = json.loads(stored.read_text())
        return result
    import shutil

    from declip.errors import InputError
    from declip.recipe import load_recipe
    from declip.training import run
    from declip.training.loop import train

    torch.set_num_threads(1)
    own = run.build_optimizer
    if cell.kind == "lamb":
        run.build_optimizer = lamb
    shutil.rmtree(work / name, ignore_errors=True)
    try:
        summary = train(load_recipe(cell.recipe, cell.overrides()), work / name, quiet=True)
        score, seconds = summary["held_out_score"], summary["seconds"]
    except InputError as error:
        print(f"{cell}: {error}", file=sys.stderr)
        score, seconds = 0.0, 0.0
    finally:
        run.build_optimizer = own
        shutil.rmtree(work / name, ignore_errors=True)
    result = {**asdict(cell), "score": score, "seconds": seconds}
    stored.write_text(json.dumps(result))
    return result


def run_cells(cells: list[Cell], work: Path, jobs: int) -> list[dict[str, Any]]:
    rows = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for row in pool.map(run_cell, cells, [work] * len(cells)):
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def mean(rows: Iterable[dict[str, Any]], **which: Any) -> float:
    return statistics.mean(row["score"] for row in rows if all(row[name] == value for name, value in which.items()))


def study_batch(args: argparse.Namespace) -> dict[str, Any]:
    """Every rate at every batch; what the rule makes of the recipe's rate, and what that scores."""
    from declip.recipe import load_recipe
    from declip.training.optimizer import learning_rate

    shape = product(range(args.seeds), BATCHES, RATES)
    pairs = args.pairs or 32_000
    cells = [Cell("clip", "resnet", "adamw", batch, rate, pairs, seed) for seed, batch, rate in shape]
    rows = run_cells(cells, args.work, args.jobs)
    found = []
    for batch in BATCHES:
        recipe = load_recipe("clip", [f"schedule.batch_size={batch}"])
        rule = max(learning_rate(step, 100, recipe) for step in range(100))
        scores = {rate: mean(rows, batch=batch, lr=rate) for rate in RATES}
        found.append({"batch": batch, "rule": rule, "scores": scores, "missed": scores[rule] < scores[OWN]})
    return {"rows": found, "missed": [f"batch {row['batch']}: the rule is no gain" for row in found if row["missed"]]}


def study_kinds(args: argparse.Namespace) -> dict[str, Any]:
    """Each optimizer at its best rate: the mean over seeds, for each recipe and pair of towers."""
    pairs = args.pairs or 48_000
    tuning = [
        Cell("clip", towers, kind, 128, rate, pairs, 0)
        for towers, kind in product(TOWERS, KINDS)
        for rate in KINDS[kind]
    ]
    tuned = run_cells(tuning, args.work, args.jobs)
    best = {
        (towers, kind): max(KINDS[kind], key=lambda rate: mean(tuned, towers=towers, kind=kind, lr=rate))
        for towers, kind in product(TOWERS, KINDS)
    }
    shape = product(("clip", "declip"), TOWERS, range(args.seeds), KINDS)
    cells = [Cell(recipe, t, kind, 128, best[t, kind], pairs, seed) for recipe, t, seed, kind in shape]
    rows = run_cells(cells, args.work, args.jobs)
    found = []
    for recipe, towers in product(("clip", "declip"), TOWERS):
        scores = {kind: mean(rows, recipe=recipe, towers=towers, kind=kind) for kind in KINDS}
        rates = {kind: best[towers, kind] for kind in KINDS}
        found.append({"recipe": recipe, "towers": towers, "rates": rates, "scores": scores})
    behind = [f"{row['recipe']}, {row['towers']}" for row in found if row["scores"]["muon"] <= row["scores"]["adamw"]]
    return {"tuning": tuned, "rows": found, "missed": [f"{where}: Muon is not ahead of AdamW" for where in behind]}


def study_cost(args: argparse.Namespace) -> dict[str, Any]:
    """Pairs a second with each optimizer, the best of some short runs by turns, on all threads."""
    import shutil

    from declip.recipe import load_recipe
    from declip.training.loop import train

    rates: dict[tuple[str, str, str], float] = {}
    for _, recipe, towers, kind in product(range(args.seeds), ("clip", "declip"), TOWERS, ("adamw", "muon")):
        cell = Cell(recipe, towers, kind, 128, 1e-3, args.pairs or 5_120, 0)
        summary = train(load_recipe(recipe, [*cell.overrides(), "data.holdout=0"]), args.work / "cost", quiet=True)
        shutil.rmtree(args.work / "cost")
        key = (recipe, towers, kind)
        rates[key] = max(rates.get(key, 0.0), summary["samples_per_second"])
    rows = [
        {"recipe": recipe, "towers": towers, **{kind: rates[recipe, towers, kind] for kind in ("adamw", "muon")}}
        for recipe, towers in product(("clip", "declip"), TOWERS)
    ]
    return {"rows": [{**row, "muon_costs": row["adamw"] / row["muon"]} for row in rows], "missed": []}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=("batch", "kinds", "cost"), required=True)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a claim does not hold")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of every cell (%(default)s)")
    parser.add_argument("--pairs", type=int, help="pairs seen by each run (batch: 32,000; kinds: 48,000; cost: 5,120)")
    parser.add_argument("--work", type=Path, default=Path("runs/optimizers"), help="where finished runs are kept")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (%(default)s)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    found = {"batch": study_batch, "kinds": study_kinds, "cost": study_cost}[args.study](args)
    if args.json:
        print(json.dumps(found))
    else:
        for row in found["rows"]:
            print(row)
        print("\n".join(f"MISSED {what}" for what in found["missed"]) or "All claims hold.")
    return 1 if args.check and found["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
