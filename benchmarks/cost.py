"""What reproducing published training costs, and where more GPUs stop to help: computed, not measured on any GPU.

    python benchmarks/cost.py [--price 2.5] [--tokens 77] [--json]

FLOPs of a pair are counted with PyTorch's FlopCounterMode: those of the towers on tensors without data
(`declip.training.flops`), those of the terms, heads included, at batches of 64 and 128; what grows with the batch is
then scaled. Everything else is assumed: the share of the GPU's peak that is reached, its price, the network's speed.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from ranks import term_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from declip.data.batch import Batch
from declip.model.dual_encoder import DualEncoder, Features
from declip.objectives.objective import build_objective
from declip.recipe import Recipe, load_recipe
from declip.training.flops import pair_flops, peak_flops

METHODS, TOWERS = ("clip", "declip"), ("rn50", "vit-b32", "vit-b16")
RUNS = {"YFCC15M, 32 epochs": (15.4e6 * 32, 4096), "88M pairs, 32 epochs": (88e6 * 32, 10240)}  # pairs seen, batch
GPU, GPUS = "NVIDIA H100", 8  # an H200 has the same peak
UTILISATIONS = (0.3, 0.5)
NETWORK = 50e9  # bytes a second of each GPU between machines, 400 Gb/s
HIDDEN = 2 / 3  # of a step is the backward pass, behind which the gradients' sum hides
SCALES = [(gpus, batch) for batch in (4096, 32768) for gpus in (8, 64, 512)]
MASKED = 0.15  # of the tokens


def flops_of(name: str, tokens: int) -> dict[str, float]:
    """FLOPs of a pair, forward and backward: `towers`, `terms` alone, and of the terms `per_row` of the batch."""
    recipe = load_recipe(name)
    model = DualEncoder(recipe)
    few, many = (term_flops(recipe, model, batch, tokens) for batch in (64, 128))
    return {
        "towers": pair_flops(recipe, tokens),
        "terms": 2 * few - many,
        "per_row": (many - few) / 64,
        "parameters": sum(p.numel() for p in model.parameters()) + head_parameters(recipe, model),
        "dim": model.dim,
    }


def head_parameters(recipe: Recipe, model: DualEncoder) -> int:
    return sum(p.numel() for p in build_objective(recipe, model).parameters())


def term_flops(recipe: Recipe, model: DualEncoder, size: int, tokens: int) -> float:
    """FLOPs that the terms of a batch take for each of its pairs, on one rank, from the second step on."""
    objective = build_objective(recipe, model)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).requires_grad_()

    ids = torch.randint(1000, (len(recipe.text_views), size, tokens))
    labels = torch.where(torch.arange(tokens) < MASKED * tokens, ids[0], -100)
    for step in range(2):  # at first the queue is empty
        batch = Batch(torch.empty(0), ids, tuple(recipe.text_views), labels, size * step + torch.arange(size))
        features = Features(
            image=random(recipe.image_views, size, model.dim),
            text={view: random(size, model.dim) for view in recipe.text_views},
            logit_scale=torch.tensor(10.0, requires_grad=True),
            text_tokens={view: random(size, tokens, model.text.width) for view in model.token_views},
            text_mask={view: torch.ones(size, tokens, dtype=torch.bool) for view in model.token_views},
        )
        with FlopCounterMode(display=False) as counter:
            objective(features, batch)[0].backward()
    return float(counter.get_total_flops()) / size


def run_cost(flops: dict[str, float], price: float) -> list[dict[str, Any]]:
    """GPU-hours, hours on 8 GPUs and money of each run at each utilisation."""
    rows = []
    peak = peak_flops(GPU, bfloat16=True) or 0.0
    for run, (pairs, batch) in RUNS.items():
        # With several ranks images meet texts twice, once for each direction.
        of_a_pair = flops["towers"] + flops["terms"] + 2 * batch * flops["per_row"]
        for utilisation in UTILISATIONS:
            hours = pairs * of_a_pair / (utilisation * peak) / 3600
            cost = {"gpu_hours": hours, "hours": hours / GPUS, "money": hours * price}
            rows.append({"run": run, "utilisation": utilisation, "gflops_of_a_pair": of_a_pair / 1e9, **cost})
    return rows


def scaling(name: str, flops: dict[str, float]) -> list[dict[str, float]]:
    """Seconds a GPU computes and sends in a step, by formula, and the share of a step that it computes.

    The gathers of the terms are waited for; the gradients' sum hides behind the backward pass.
    """
    recipe, peak, rows = load_recipe(name), peak_flops(GPU, bfloat16=True) or 0.0, []
    for gpus, batch in SCALES:
        own, others = batch // gpus, gpus - 1
        sent = term_bytes(recipe, gpus, own, int(flops["dim"]))
        terms = others * (2 * sent["exchanged"] + sent["gathered"])
        gradients = 2 * 4 * flops["parameters"] * others / gpus
        of_a_pair = flops["towers"] + flops["terms"] + 2 * batch * flops["per_row"]
        compute = own * of_a_pair / (UTILISATIONS[-1] * peak)
        waited = terms / NETWORK + max(0.0, gradients / NETWORK - HIDDEN * compute)
        rows.append(
            {
                **{"gpus": gpus, "batch": batch, "rows_of_a_gpu": own},
                **{"terms_gb": terms / 1e9, "gradients_gb": gradients / 1e9},
                **{"compute_ms": 1e3 * compute, "terms_ms": 1e3 * terms / NETWORK},
                **{"gradients_ms": 1e3 * gradients / NETWORK, "efficiency": compute / (compute + waited)},
            }
        )
    return rows


def print_tables(found: dict[str, Any], price: float) -> None:
    out = Console(width=150)
    out.print(f"Computed, not measured: {GPU}, {peak_flops(GPU, True):.3g} FLOP/s, {price:g} an hour and GPU")
    table = Table("recipe", "GFLOP a pair", "run", "MFU", "GPU-hours", f"hours on {GPUS}", "money")
    for name, one in found.items():
        for row in one["runs"]:
            flops, share = f"{row['gflops_of_a_pair']:.1f}", f"{row['utilisation']:.0%}"
            times = (f"{row[key]:,.0f}" for key in ("gpu_hours", "hours", "money"))
            table.add_row(name, flops, row["run"], share, *times)
    out.print(table)
    table = Table("recipe", "batch", "GPUs", "rows", "terms", "gradients", "compute", "terms", "gradients", "computing")
    for name, one in found.items():
        for row in one["scaling"]:
            sizes = (f"{row[key]:.3f} GB" for key in ("terms_gb", "gradients_gb"))
            times = (f"{row[key]:.1f} ms" for key in ("compute_ms", "terms_ms", "gradients_ms"))
            counts = (str(row[key]) for key in ("batch", "gpus", "rows_of_a_gpu"))
            table.add_row(name, *counts, *sizes, *times, f"{row['efficiency']:.0%}")
    out.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--price", type=float, default=2.5, help="of a GPU for an hour, an assumption (%(default)s)")
    parser.add_argument("--tokens", type=int, default=77, help="length of the longest caption (%(default)s)")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for name in [f"{method}-{tower}" for tower in TOWERS for method in METHODS]:
        flops = flops_of(name, args.tokens)
        found[name] = {"flops": flops, "runs": run_cost(flops, args.price), "scaling": scaling(name, flops)}
    if args.json:
        assumed = {"gpu": GPU, "price": args.price, "tokens": args.tokens, "network": NETWORK, "measured": False}
        print(json.dumps({"assumed": assumed, "recipes": found}))
    else:
        print_tables(found, args.price)
    return 0


if __name__ == "__main__":
    sys.exit(main())
