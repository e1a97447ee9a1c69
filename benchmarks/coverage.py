"""Of the emoji grid: image → text recall on names that were in a fraction of the pairs, and on others.

    python benchmarks/data_efficiency.py --sets emoji       # first: makes the cells that are read here
    python benchmarks/coverage.py

A name counts as trained on where a picture of another artist with the same first caption was in the fraction.
Cells are told apart by their method's name: where a recipe changes between two grids, give each its own --work.
"""

from __future__ import annotations

import argparse
import json
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from data_efficiency import SETS

from declip.compare.search import best_held_out
from declip.data.sources import open_sources
from declip.evaluation.retrieval import RECALL_AT, percent_within
from declip.pairs import Data
from declip.training.pairs import open_pairs

EMOJI = SETS["emoji"]


@cache
def trained_on(fraction: str, seed: int) -> list[bool]:
    """Of each judged pair whether its name was in a fraction of the training pairs."""
    data = Data(train=EMOJI.data, fraction=float(Fraction(fraction)), fraction_seed=seed)
    train, judged = open_pairs(data)[0], open_sources(EMOJI.judged, data)
    names = {train.captions(index)[0] for index in range(len(train))}
    return [judged.captions(index)[0] in names for index in range(len(judged))]


def recall(ranks: list[int]) -> float:
    """Mean of R@1, R@5 and R@10 in percent."""
    return mean(percent_within(torch.tensor(ranks), depth) for depth in RECALL_AT) if ranks else float("nan")


def chosen(folder: Path) -> list[dict[str, Any]]:
    """The longest cells; of those that differ in the rate alone the one with the best held-out score."""
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    longest = max((cell["seen"] for cell in cells), default=0)
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for cell in cells:
        where = cell["method"], cell["fraction"], cell["seed"]
        if cell["status"] == "done" and cell["seen"] > 0.9 * longest:
            found[where] = max(found.get(where, cell), cell, key=best_held_out)
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/data_efficiency"), help="of data_efficiency.py")
    parser.add_argument("--json", action="store_true", help="the figures as JSON on stdout")
    args = parser.parse_args()
    rows = []
    for cell in chosen(args.work / "emoji" / "cells"):
        known = trained_on(cell["fraction"], cell["seed"])
        ranks = cell["judged"][EMOJI.judged[0]]["ranks"]["image_to_text"]
        rows.append(
            {name: cell[name] for name in ("method", "fraction", "seed")}
            | {"share_known": mean(known)}
            | {
                name: recall([rank for rank, was in zip(ranks, known, strict=True) if was == side])
                for name, side in (("known", True), ("new", False))
            }
        )
    rows.sort(key=lambda row: (-Fraction(row["fraction"]), row["method"], row["seed"]))
    if not rows:
        print(f"{args.work / 'emoji'} holds no cells: run data_efficiency.py --sets emoji first.", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        told = "{method:12} {fraction:>5} seed {seed}: {share_known:.0%} known; known {known:.1f}, new {new:.1f}"
        print(told.format(**row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
