"""The linear probe beside scikit-learn's logistic regression: the same strengths, which is faster, which is nearer.

    python benchmarks/linear_probe.py [--only small] [--threads 2] [--tolerance 1e-4] [--strengths 4] [--json] [--check]

Ours is a whole probe: CLIP's search of 15 strengths or so, and the final fit to train and validation. scikit-learn's is
`LogisticRegression(C=1 / strength, solver="lbfgs", max_iter=1000, tol=--tolerance)` on the same float32 features at
each strength that our search tried, and the same final fit. Where that takes too long, `--strengths` measures it at so
many, evenly from the smallest to the greatest, and reports the sum as if the others took as long on average:
`extrapolated`.

The objective is computed in float64 from both solutions, for every strength that scikit-learn was measured at. Features
are made: clusters that overlap, a falling spectrum, a large common mean, unit norm, as embeddings of CLIP have them.
Needs an otherwise idle computer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from declip.evaluation.linear_probe import STRENGTHS, Features, _Sweep
from declip.evaluation.logistic import LogisticProblem

SIZES = {"small": (10_000, 512, 10), "large": (50_000, 1024, 100)}  # rows of train, width, classes
FASTER = 10.0  # at least: scikit-learn's seconds over ours
OBJECTIVE = 1e-6  # at most: how far ours lies above scikit-learn's, of it
ACCURACY = 0.2  # at most: points that the final classifier lies below scikit-learn's on test


def clusters(rows: int, width: int, classes: int) -> Features:
    draw = torch.Generator().manual_seed(0)
    spread = torch.arange(1, width + 1).float() ** -0.5
    axes, _ = torch.linalg.qr(torch.randn(width, width, generator=draw))
    means = 0.35 * torch.randn(classes, width, generator=draw) * spread
    labels = torch.randint(classes, (rows,), generator=draw)
    points = means[labels] + 2 * torch.randn(rows, width, generator=draw) * spread
    return Features(F.normalize(points @ axes.T + 1.5 * spread.norm() * axes[:, 0]), labels)


def objective(features: Features, weight: Tensor, bias: Tensor, strength: float) -> float:
    logits = features.embeddings.double() @ weight.double().T + bias.double()
    entropy = F.cross_entropy(logits, features.labels, reduction="sum")
    return float(entropy + strength / 2 * weight.double().square().sum())


def accuracy(features: Features, weight: Tensor, bias: Tensor) -> float:
    right = (features.embeddings @ weight.float().T + bias.float()).argmax(1) == features.labels
    return 100 * float(right.double().mean())


def scikit_learn(features: Features, strength: float, tolerance: float) -> tuple[Tensor, Tensor, float, int]:
    model = LogisticRegression(C=1 / strength, solver="lbfgs", max_iter=1000, tol=tolerance)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(features.embeddings.numpy(), features.labels.numpy())
    seconds = time.perf_counter() - start
    return torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_), seconds, int(model.n_iter_[0])


def measure(rows: int, width: int, classes: int, tolerance: float, strengths: int | None) -> dict[str, Any]:
    everything = clusters(rows + 2 * (rows // 5), width, classes)
    count = rows + rows // 5
    train, both = everything.take(torch.arange(rows)), everything.take(torch.arange(count))
    validation, test = everything.take(torch.arange(rows, count)), everything.take(torch.arange(count, len(everything)))

    start = time.perf_counter()
    problem = LogisticProblem(both.embeddings, both.labels, classes)
    sweep = _Sweep(problem.first(rows), validation, torch.arange(classes))
    best = sweep.search()
    weight, bias, _ = sweep.solutions[best]
    final = problem.solve(torch.tensor([STRENGTHS[best]]), (weight[None], bias[None]))
    ours = time.perf_counter() - start

    tried = sorted(sweep.solutions)
    measured = tried if strengths is None else [tried[i] for i in _evenly(len(tried), strengths)]
    compared = [_compare(STRENGTHS[step], train, validation, sweep.solutions[step], tolerance) for step in measured]
    last = _compare(STRENGTHS[best], both, test, (final.weight[0], final.bias[0]), tolerance)
    theirs = sum(row["sklearn_seconds"] for row in compared) * len(tried) / len(measured) + last["sklearn_seconds"]
    return {
        "rows": rows,
        "width": width,
        "classes": classes,
        "strengths": len(tried),
        "seconds": ours,
        "sklearn_seconds": theirs,
        "extrapolated": len(measured) < len(tried),
        "ratio": theirs / ours,
        "compared": compared,
        "final": last,
    }


def _evenly(count: int, wanted: int) -> list[int]:
    return sorted({round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)})


def _compare(
    strength: float,
    fitted: Features,
    judged: Features,
    solution: tuple[Tensor, Tensor, bool] | tuple[Tensor, Tensor],
    tolerance: float,
) -> dict[str, Any]:
    weight, bias, seconds, iterations = scikit_learn(fitted, strength, tolerance)
    ours, theirs = objective(fitted, *solution[:2], strength), objective(fitted, weight, bias, strength)
    return {
        "strength": strength,
        "objective": ours,
        "sklearn_objective": theirs,
        "accuracy": accuracy(judged, *solution[:2]),
        "sklearn_accuracy": accuracy(judged, weight, bias),
        "sklearn_seconds": seconds,
        "sklearn_iterations": iterations,
    }


def missed_targets(name: str, found: dict[str, Any]) -> list[str]:
    missed = [] if found["ratio"] >= FASTER else [f"{name}: {found['ratio']:.1f} times as fast as scikit-learn"]
    for row in [*found["compared"], found["final"]]:
        if row["objective"] > row["sklearn_objective"] * (1 + OBJECTIVE):
            missed.append(f"{name}: the objective at {row['strength']:.3g} is above scikit-learn's")
    if found["final"]["accuracy"] < found["final"]["sklearn_accuracy"] - ACCURACY:
        missed.append(f"{name}: accuracy")
    return missed


def report(name: str, found: dict[str, Any]) -> None:
    about = "about " if found["extrapolated"] else ""
    print(
        f"{name}: {found['rows']} x {found['width']}, {found['classes']} classes, {found['strengths']} strengths: "
        f"{found['seconds']:.1f} s, scikit-learn {about}{found['sklearn_seconds']:.1f} s, {found['ratio']:.1f} times"
    )
    for row in [*found["compared"], found["final"]]:
        print(
            f"  {row['strength']:9.3g}: objective {row['objective']:.7g}, scikit-learn {row['sklearn_objective']:.7g}; "
            f"accuracy {row['accuracy']:.2f}, {row['sklearn_accuracy']:.2f}; "
            f"scikit-learn {row['sklearn_seconds']:.2f} s, {row['sklearn_iterations']} iterations"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SIZES)
    parser.add_argument("--rows", type=int, help="rows of train, in place of the size's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="scikit-learn's tol; 1e-4 is its default")
    parser.add_argument("--strengths", type=int, help="how many scikit-learn is measured at; by default all")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a target is missed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found, missed = {}, []
    with threadpool_limits(args.threads):
        for name, (rows, width, classes) in SIZES.items():
            if args.only in (None, name):
                found[name] = measure(args.rows or rows, width, classes, args.tolerance, args.strengths)
                missed += missed_targets(name, found[name])
                if not args.json:
                    report(name, found[name])
    if args.json:
        print(json.dumps({"threads": args.threads, "tolerance": args.tolerance, "missed": missed, **found}))
    else:
        print("\n".join(f"MISSED {what}" for what in missed) or "All targets met.")
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
