"""Memory and time of the losses that would fill the memory in their naive form.

    python benchmarks/loss_memory.py [--json] [--check]

token_wise: patches against words at 1,024 pairs, 49 × 77 tokens, width 256: peak memory of the whole process, and at
sizes where the naive form fits, both forms' time and value. simclr: peak memory over the start, against the broadcast
that the public code makes, for 2 × 128 anchors among 2 × 128 × 32 candidates. sigmoid: in chunks against dense.
Each memory figure is a process of its own. Needs an otherwise idle computer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from declip.model.chunks import CHUNK_BYTES
from declip.objectives.sigmoid import sigmoid_loss
from declip.objectives.simclr import nt_xent
from declip.objectives.token_wise import token_wise_infonce

PATCHES, WORDS, WIDTH = 49, 77, 256
TOKEN_WISE_GB = 2.0  # at most: peak memory of the process at 1,024 pairs
TOKEN_WISE_TIME = 1.3  # at most: seconds over the naive form's
TOKEN_WISE_EQUAL = 1e-6  # at most: relative difference to the naive form
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


def broadcast_nt_xent(z1: Tensor, z2: Tensor, candidates: tuple[Tensor, Tensor]) -> Tensor:
    """As the public code computes it: the cosines of all pairs by broadcasting."""
    anchors, others = torch.cat([z1, z2]), torch.cat(candidates)
    logits = F.cosine_similarity(anchors[:, None], others[None], dim=-1) / 0.1
    own = torch.cat([torch.arange(len(z1)), torch.arange(len(z1)) + len(others) // 2])
    return F.cross_entropy(logits.scatter(1, own[:, None], float("-inf")), own.roll(len(z1)))


def memory_of(case: str) -> dict[str, float]:
    """Run a loss forward and backward in this process; its peak memory in GB, whole and over the start."""
    if case == "token_wise":
        images, texts = tokens(1024)
        start = _reset_peak()
        token_wise_infonce(images, texts, SCALE).backward()
    elif case == "sigmoid":
        images, texts = unit(16384, WIDTH), unit(16384, WIDTH)
        start = _reset_peak()
        sigmoid_loss(images, texts, SCALE, torch.tensor(-10.0), 1024).backward()
    else:
        one, other, views = unit(128, WIDTH), unit(128, WIDTH), (unit(4096, WIDTH), unit(4096, WIDTH))
        start = _reset_peak()
        (nt_xent(one, other, 0.1, views) if case == "simclr" else broadcast_nt_xent(one, other, views)).backward()
    peak = _resident("VmHWM")
    return {"peak_gb": peak / 2**20, "over_start_gb": (peak - start) / 2**20}


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


def measure() -> dict[str, Any]:
    small = compare_token_wise(16)
    chunk = CHUNK_BYTES["cpu"]
    CHUNK_BYTES["cpu"] = 2**18
    chunked = compare_token_wise(16)
    CHUNK_BYTES["cpu"] = chunk
    images, texts = unit(512, 256), unit(512, 256)
    dense, parts = (sigmoid_loss(images, texts, SCALE, torch.tensor(-10.0), size).item() for size in (512, 100))
    simclr, broadcast = memory("simclr"), memory("broadcast")
    return {
        "token_wise_memory": memory("token_wise"),
        "token_wise": [small, compare_token_wise(64), compare_token_wise(128), compare_token_wise(256)],
        "token_wise_chunked_difference": chunked["difference"],
        "simclr_memory": simclr,
        "simclr_broadcast_memory": broadcast,
        "simclr_share": simclr["over_start_gb"] / broadcast["over_start_gb"],
        "sigmoid_difference": abs(dense - parts) / dense,
        "sigmoid_memory": memory("sigmoid"),
    }


def missed_targets(found: dict[str, Any]) -> list[str]:
    missed = []
    if found["token_wise_memory"]["peak_gb"] > TOKEN_WISE_GB:
        missed.append("token_wise: memory")
    missed += [f"token_wise: time at {row['batch']}" for row in found["token_wise"] if row["ratio"] > TOKEN_WISE_TIME]
    differences = [row["difference"] for row in found["token_wise"]] + [found["token_wise_chunked_difference"]]
    if max(differences) > TOKEN_WISE_EQUAL or found["sigmoid_difference"] > TOKEN_WISE_EQUAL:
        missed.append("a value differs")
    if found["simclr_share"] > SIMCLR_SHARE:
        missed.append("simclr: memory")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(memory_of(args.case)))
        return 0
    found = measure()
    missed = missed_targets(found)
    if args.json:
        print(json.dumps({**found, "threads": torch.get_num_threads(), "missed": missed}))
    else:
        print(f"token_wise, 1,024 pairs: peak {found['token_wise_memory']['peak_gb']:.2f} GB")
        for row in found["token_wise"]:
            print(
                f"token_wise, {row['batch']} pairs: {row['seconds']:.3f} s, naive {row['naive_seconds']:.3f} s, ratio "
                f"{row['ratio']:.2f}; loss differs by {row['difference']:.0e}, gradient by "
                f"{row['gradient_difference']:.0e}"
            )
        print(f"simclr: {found['simclr_share']:.4f} of the broadcast form's memory")
        print(f"sigmoid, 16,384 pairs in chunks of 1,024: peak {found['sigmoid_memory']['peak_gb']:.2f} GB")
        print("\n".join(f"MISSED {what}" for what in missed) or "All targets met.")
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
