"""Of the emoji grid: image → text recall on names that were in a fraction of the pairs, and on others.

    python benchmarks/data_efficiency.py --sets emoji       # first: makes the cells that are read here
    python benchmarks/coverage.py

A name counts as trained on where a picture of another artist with the same first caption was in the fraction.
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

from declip.compare.run import RESULTS
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


def cells(grid: Path) -> list[dict[str, Any]]:
    """The runs of a grid that have seen as many pairs as was asked for, each with what it has found."""
    result = json.loads((grid / RESULTS).read_text())
    whole = [run for run in result["runs"] if run["pairs_seen"] == result["pairs_seen"]]
    found = [run | json.loads((grid / run["file"]).read_text()) for run in whole]
    return [cell for cell in found if cell["status"] == "done"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/data_efficiency"), help="of data_efficiency.py")
    parser.add_argument("--json", action="store_true", help="the figures as JSON on stdout")
    args = parser.parse_args()
    grid = args.work / "emoji"
    if not (grid / RESULTS).is_file():
        print(f"{grid} holds no {RESULTS}: run data_efficiency.py --sets emoji first.", file=sys.stderr)
        return 2
    rows = []
    for cell in cells(grid):
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
    if args.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        told = "{method:12} {fraction:>5} seed {seed}: {share_known:.0%} known; known {known:.1f}, new {new:.1f}"
        print(told.format(**row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
