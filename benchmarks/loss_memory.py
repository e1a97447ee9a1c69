"""Memory and time of the losses that would fill the memory in their naive form.

    python benchmarks/loss_memory.py [--only contrastive] [--batch 8192] [--json] [--check]

contrastive, sigmoid: beside open_clip's ClipLoss and SigLipLoss, width 512. Peak memory over the start at 65,536 pairs
(`--batch`); open_clip's there is a·n² + b·n, from its measured peaks at an eighth and a quarter of the pairs. Time,
value and gradients at these two sizes, by turns. At 65,536 this takes 8 GB; 8,192 is quick, but there the chunks' own
memory shows.

token_wise: patches against words at 1,024 pairs, 49 × 77 tokens, width 256: peak memory of the whole process, and at
sizes where the naive form fits, both forms' time and value. simclr: peak memory over the start, against the broadcast
that the public code makes, for 2 × 128 anchors among 2 × 128 × 32 candidates.

Each memory figure is a process of its own. Needs an otherwise idle computer.
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
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from declip.model.chunks import CHUNK_BYTES
from declip.objectives.contrastive import multi_view_infonce
from declip.objectives.sigmoid import sigmoid_loss
from declip.objectives.simclr import nt_xent
from declip.objectives.token_wise import token_wise_infonce

PATCHES, WORDS, WIDTH = 49, 77, 256
TOKEN_WISE_GB = 2.0  # at most: peak memory of the process at 1,024 pairs
TOKEN_WISE_TIME = 1.3  # at most: seconds over the naive form's
TOKEN_WISE_EQUAL = 1e-6  # at most: relative difference to the naive form
PAIRS_WIDTH = 512
PAIRS_SHARE = 1 / 10  # at most: of the memory of open_clip's loss
PAIRS_TIME = 1.3  # at most: seconds over those of open_clip's loss
PAIRS_EQUAL = 1e-6  # at most: relative difference of the value and of each gradient
SIMCLR_SHARE = 1 / 20  # at most: of the broadcast form's memory
SCALE = torch.tensor(14.0)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1).requires_grad_()


def tokens(batch: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return unit(batch, PATCHES, WIDTH), unit(batch, WORDS, WIDTH)


def naive_token_wise(images: Tensor, texts: Tensor) -> Tensor:
    """All token similarities at once, as one would write it down."""
    similarity = torch.einsum("bid,ljd->blij", images, texts)
    there, back = similarity.amax(-1).mean(-1), similarity.amax(-2).mean(-1)
    target = torch.arange(len(images))
    return (F.cross_entropy(SCALE * there, target) + F.cross_entropy(SCALE * back.T, target)) / 2


def broadcast_nt_xent(z1: Tensor, z2: Tensor, temperature: float, candidates: tuple[Tensor, Tensor]) -> Tensor:
    """As the public code computes it: the cosines of all pairs by broadcasting."""
    anchors, others = torch.cat([z1, z2]), torch.cat(candidates)
    logits = F.cosine_similarity(anchors[:, None], others[None], dim=-1) / temperature
    own = torch.cat([torch.arange(len(z1)), torch.arange(len(z1)) + len(others) // 2])
    return F.cross_entropy(logits.scatter(1, own[:, None], float("-inf")), own.roll(len(z1)))


# Of images, texts, logit scale and bias: ours and open_clip's.
PAIR_LOSSES: dict[str, dict[str, Callable[..., Tensor]]] = {
    "contrastive": {
        "declip": lambda images, texts, scale, bias: multi_view_infonce(images[None], texts[None], scale),
        "open_clip": lambda images, texts, scale, bias: ClipLoss()(images, texts, scale),
    },
    "sigmoid": {"declip": sigmoid_loss, "open_clip": SigLipLoss()},
}


NAMES = [*PAIR_LOSSES, "token_wise", "simclr"]


def pairs(batch: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    numbers = (torch.tensor(number).requires_grad_() for number in (14.0, -10.0))
    return unit(batch, PAIRS_WIDTH), unit(batch, PAIRS_WIDTH), *numbers


def memory_of(case: str) -> dict[str, float]:
    """Run a loss forward and backward in this process; its peak memory in GB, whole and over the start."""
    if case == "token_wise":
        given: tuple[Any, ...] = (*tokens(1024), SCALE)
        loss: Callable[..., Tensor] = token_wise_infonce
    elif case in ("simclr", "broadcast"):
        given = unit(128, WIDTH), unit(128, WIDTH), 0.1, (unit(4096, WIDTH), unit(4096, WIDTH))
        loss = nt_xent if case == "simclr" else broadcast_nt_xent
    else:
        name, side, batch = case.split()
        given, loss = pairs(int(batch)), PAIR_LOSSES[name][side]
    start, began = _reset_peak(), time.perf_counter()
    loss(*given).backward()
    took, peak = time.perf_counter() - began, _resident("VmHWM")
    return {"peak_gb": peak / 2**20, "over_start_gb": (peak - start) / 2**20, "seconds": took}


def _reset_peak() -> int:
    """Forget the peak of the imports; the memory held now, in KB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def memory(case: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--case", case], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def seconds(loss: Callable[[], Tensor], repeats: int = 5) -> float:
    """Median of forward and backward."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        loss().backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def ours_of(images: Tensor, texts: Tensor) -> Tensor:
    return token_wise_infonce(images, texts, SCALE)


def compare_token_wise(batch: int) -> dict[str, float]:
    images, texts = tokens(batch)
    ours, naive = ours_of(images, texts), naive_token_wise(images, texts)
    repeats = max(2, 512 // batch)
    times = [  # by turns, so that both meet the same machine
        tuple(seconds(lambda loss=loss: loss(images, texts), repeats) for loss in (ours_of, naive_token_wise))
        for _ in range(3)
    ]
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "batch": batch,
        "seconds": mine,
        "naive_seconds": theirs,
        "ratio": mine / theirs,
        "difference": abs(ours.item() - naive.item()) / naive.item(),
        "gradient_difference": _gradient_difference(images, texts),
    }


def _gradient_difference(images: Tensor, texts: Tensor) -> float:
    found = []
    for loss in (token_wise_infonce(images, texts, SCALE), naive_token_wise(images, texts)):
        images.grad = None
        loss.backward()
        found.append(images.grad)
    return float((found[0] - found[1]).norm() / found[1].norm())


def compare_pairs(name: str, batch: int, turns: int = 3) -> dict[str, Any]:
    """Both sides by turns: the fastest seconds, and how far values and gradients differ."""
    times: dict[str, list[float]] = {"declip": [], "open_clip": []}
    found: dict[str, list[Tensor]] = {}
    given = pairs(batch)
    for _ in range(turns):
        for side, loss in PAIR_LOSSES[name].items():
            start = time.perf_counter()
            value = loss(*given)
            gradients = torch.autograd.grad(value, given, allow_unused=True)
            times[side].append(time.perf_counter() - start)
            found[side] = [value.detach(), *(gradient for gradient in gradients if gradient is not None)]
            del value, gradients
    differences = [float((a - b).norm() / b.norm()) for a, b in zip(*found.values(), strict=True)]
    seconds_of = {f"{side}_seconds": min(row) for side, row in times.items()}
    ratio = seconds_of["declip_seconds"] / seconds_of["open_clip_seconds"]
    return {"batch": batch, **seconds_of, "ratio": ratio, "turns": times, "differences": differences}


def measure_pairs(name: str, batch: int) -> dict[str, Any]:
    sizes = batch // 8, batch // 4
    one, other = (memory(f"{name} open_clip {size}")["over_start_gb"] for size in sizes)
    per_pair = (4 * one - other) / sizes[1]  # of a·n² + b·n this is b, from n and 2n
    by_formula = (one - per_pair * sizes[0]) * 64 + per_pair * batch
    ours = {size: memory(f"{name} declip {size}") for size in (*sizes, batch)}
    return {
        "batch": batch,
        "declip_gb": {size: row["over_start_gb"] for size, row in ours.items()},
        "declip_seconds": ours[batch]["seconds"],
        "open_clip_gb": {sizes[0]: one, sizes[1]: other},
        "open_clip_gb_by_formula": by_formula,
        "share": ours[batch]["over_start_gb"] / by_formula,
        "compared": [compare_pairs(name, size) for size in sizes],
    }


def measure_token_wise() -> dict[str, Any]:
    small = compare_token_wise(16)
    chunk = CHUNK_BYTES["cpu"]
    CHUNK_BYTES["cpu"] = 2**18
    chunked = compare_token_wise(16)
    CHUNK_BYTES["cpu"] = chunk
    return {
        "memory": memory("token_wise"),
        "compared": [small, compare_token_wise(64), compare_token_wise(128), compare_token_wise(256)],
        "chunked_difference": chunked["difference"],
    }


def measure_simclr() -> dict[str, Any]:
    ours, broadcast = memory("simclr"), memory("broadcast")
    share = ours["over_start_gb"] / broadcast["over_start_gb"]
    return {"memory": ours, "broadcast_memory": broadcast, "share": share}


def measure(name: str, batch: int) -> dict[str, Any]:
    match name:
        case "token_wise":
            return measure_token_wise()
        case "simclr":
            return measure_simclr()
    return measure_pairs(name, batch)


def missed_targets(name: str, found: dict[str, Any]) -> list[str]:
    if name == "simclr":
        return ["simclr: memory"] if found["share"] > SIMCLR_SHARE else []
    if name == "token_wise":
        small, limit = found["memory"]["peak_gb"] <= TOKEN_WISE_GB, TOKEN_WISE_TIME
        differences = [row["difference"] for row in found["compared"]] + [found["chunked_difference"]]
        equal = max(differences) <= TOKEN_WISE_EQUAL
    else:
        small, limit = found["share"] <= PAIRS_SHARE, PAIRS_TIME
        equal = max(max(row["differences"]) for row in found["compared"]) <= PAIRS_EQUAL
    missed = [f"{name}: {what}" for what, met in (("memory", small), ("a value differs", equal)) if not met]
    return missed + [f"{name}: time at {row['batch']}" for row in found["compared"] if row["ratio"] > limit]


def report(name: str, found: dict[str, Any]) -> None:
    if name == "simclr":
        print(f"simclr: {found['share']:.4f} of the broadcast form's memory")
    elif name == "token_wise":
        print(f"token_wise, 1,024 pairs: peak {found['memory']['peak_gb']:.2f} GB")
        for row in found["compared"]:
            print(
                f"token_wise, {row['batch']} pairs: {row['seconds']:.3f} s, naive {row['naive_seconds']:.3f} s, ratio "
                f"{row['ratio']:.2f}; loss differs by {row['difference']:.0e}, gradient by "
                f"{row['gradient_difference']:.0e}"
            )
    else:
        report_pairs(name, found)


def report_pairs(name: str, found: dict[str, Any]) -> None:
    batch = found["batch"]
    print(
        f"{name}, {batch:,} pairs: {found['declip_gb'][batch]:.2f} GB, {found['declip_seconds']:.0f} s; open_clip by "
        f"formula {found['open_clip_gb_by_formula']:.1f} GB; share {found['share']:.4f}"
    )
    for row in found["compared"]:
        size = row["batch"]
        print(
            f"{name}, {size:,} pairs: {found['declip_gb'][size]:.2f} GB, {row['declip_seconds']:.2f} s; open_clip "
            f"{found['open_clip_gb'][size]:.2f} GB, {row['open_clip_seconds']:.2f} s; ratio {row['ratio']:.2f}; values "
            f"and gradients differ by {max(row['differences']):.0e}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--only", choices=NAMES, help="one loss; by default all")
    parser.add_argument("--batch", type=int, default=65536, help="pairs of contrastive and sigmoid (%(default)s)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(memory_of(args.case)))
        return 0
    found = {name: measure(name, args.batch) for name in ([args.only] if args.only else NAMES)}
    missed = [what for name, row in found.items() for what in missed_targets(name, row)]
    if args.json:
        load = os.getloadavg()[0]
        print(json.dumps({**found, "threads": torch.get_num_threads(), "load": load, "missed": missed}))
    else:
        for name, row in found.items():
            report(name, row)
        print("\n".join(f"MISSED {what}" for what in missed) or "All targets met.")
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
