"""Better from the same pairs: DeCLIP, CLIP and a plain open_clip loop, trained on few pairs and judged on unseen ones.

    python benchmarks/few_pairs.py --shared ../shared            # everything, hours on two cores
    python benchmarks/few_pairs.py --sets emoji-quarter --check  # one setting; exit 1 where DeCLIP is not above CLIP
    python benchmarks/few_pairs.py --ablation                    # each term off, on held-out pairs

Emoji: Noto and Twemoji, judged on Fluent 3D, an artist nobody trained on. Flickr8k: train, judged on dev. Lengths and
rates were chosen on held-out pairs (emoji: Noto judged on Twemoji; Flickr8k: a tenth of train), never on the test set.
Finished cells are kept under --work by the hash of their recipe, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

WAYS = ("text_to_image", "image_to_text")
EMOJI = {"train": ["demo:noto", "demo:twemoji"], "test": "demo:fluent3d", "recall": 1}
FLICKR = {"train": ["{shared}/data/flickr8k_train.parquet"], "test": "{shared}/data/flickr8k_dev.parquet", "recall": 10}
# Pairs that a method sees where its held-out score stops rising (docs/results.md, "How long").
SETS: dict[str, dict[str, Any]] = {
    "emoji": {**EMOJI, "fraction": 1.0, "pairs": 30_000},
    "emoji-quarter": {**EMOJI, "fraction": 0.25, "pairs": 15_000},
    "flickr8k": {**FLICKR, "fraction": 1.0, "pairs": 30_000},
    "flickr8k-quarter": {**FLICKR, "fraction": 0.25, "pairs": 15_000},
}
# DeCLIP's second view and extra terms cost time: CLIP is also given the pairs that it sees in DeCLIP's wall time.
EQUAL_TIME = 2.0
ABLATIONS: dict[str, tuple[str, list[str]]] = {
    "CLIP": ("clip", []),
    "DeCLIP": ("declip", []),
    "without simsiam": ("declip", ["terms.simsiam.weight=0"]),
    "without masked language": ("declip", ["terms.masked_language.weight=0"]),
    "without nearest neighbours": ("declip", ["terms.nearest_neighbour.weight=0"]),
    "multi-view contrastive alone": (
        "declip",
        ["terms.simsiam.weight=0", "terms.masked_language.weight=0", "terms.nearest_neighbour.weight=0"],
    ),
    "both text views from one caption": ("declip", ["data.text.independent=false"]),
    "published strong image views": (
        "declip",
        [
            "data.images.crop_scale=[0.2,1.0]",
            "data.images.jitter=0.8",
            "data.images.grayscale=0.2",
            "data.images.blur=0.5",
            "data.images.flip=0.5",
        ],
    ),
    "without the masked text as a view": ("declip", ['terms.contrastive.texts=["caption"]']),
}


@dataclass(frozen=True)
class Cell:
    """One training run: which method, on which pairs, how long, which seed."""

    group: str
    method: str
    base: str
    overrides: tuple[str, ...]
    test: str | None
    peer: bool = False

    def key(self) -> str:
        from declip.recipe import load_recipe, to_toml

        text = to_toml(load_recipe(self.base, list(self.overrides))) + f"{self.test} {self.peer}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def main_cells(names: list[str], seeds: int, shared: str) -> list[Cell]:
    """Every cell, the comparison of the two methods first, so that a stopped run has whole rows."""
    cells = []
    for methods in ({"CLIP": "clip", "DeCLIP": "declip"}, {"open_clip loop": "clip"}, {"CLIP, equal time": "clip"}):
        for seed, name, (method, base) in product(range(seeds), names, methods.items()):
            options = SETS[name]
            pairs = options["pairs"] * (EQUAL_TIME if method == "CLIP, equal time" else 1)
            overrides = (
                f"data.train={json.dumps([path.format(shared=shared) for path in options['train']])}",
                "data.holdout=0",
                f"data.fraction={options['fraction']}",
                f"data.fraction_seed={seed}",
                f"schedule.pairs_seen={round(pairs)}",
                f"seed={seed}",
            )
            test = options["test"].format(shared=shared)
            cells.append(Cell(name, method, base, overrides, test, peer=method == "open_clip loop"))
    return cells


def ablation_cells(seeds: int) -> list[Cell]:
    common = ('data.train=["demo:noto"]', 'data.validation=["demo:twemoji"]', "data.fraction=0.5")
    return [
        Cell("ablation", name, base, (*common, "schedule.pairs_seen=30000", f"seed={seed}", *changes), None)
        for name, (base, changes) in ABLATIONS.items()
        for seed in range(seeds)
    ]


def run_cell(cell: Cell, work: Path, threads: int) -> dict[str, Any]:
    """Train and judge one cell, unless its result is there already."""
    stored = work / f"{cell.key()}.json"
    if stored.is_file():
        result: dict[str, Any] = json.loads(stored.read_text())
        return result
    import shutil

    import torch

    from declip.evaluation import evaluate
    from declip.model.pretrained import load
    from declip.recipe import load_recipe
    from declip.training.logging import read_metrics
    from declip.training.loop import train

    torch.set_num_threads(threads)
    recipe = load_recipe(cell.base, [*cell.overrides, "data.workers=0"])
    out = work / cell.key()
    shutil.rmtree(out, ignore_errors=True)
    if cell.peer:
        from peer_open_clip import train_peer

        model, summary = train_peer(recipe)
    else:
        summary = train(recipe, out, quiet=True)
        model = load(out)
    metrics = evaluate(model, [cell.test], ["retrieval"])["results"][0]["metrics"] if cell.test else {}
    curve = [] if cell.peer else [row for row in read_metrics(out) if "held_out" in row]
    result = {"summary": summary, "metrics": metrics, "curve": curve}
    stored.write_text(json.dumps(result))
    shutil.rmtree(out, ignore_errors=True)
    return result


def score(result: dict[str, Any], recall: int) -> float:
    """Mean of both directions' R@recall on the test set, or the best held-out score where there is no test set."""
    if not result["metrics"]:
        return max(row["held_out"]["score"] for row in result["curve"])
    return statistics.mean(result["metrics"][f"{way}_r{recall}"] for way in WAYS)


def summarise(cells: list[Cell], results: dict[Cell, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for group, method in dict.fromkeys((cell.group, cell.method) for cell in cells):
        mine = [results[cell] for cell in cells if (cell.group, cell.method) == (group, method)]
        recall = SETS[group]["recall"] if group in SETS else 0
        scores = [score(result, recall) for result in mine]
        row = {
            "set": group,
            "method": method,
            "recall": recall,
            "seeds": len(scores),
            "mean": statistics.mean(scores),
            "sd": statistics.stdev(scores) if len(scores) > 1 else 0.0,
            "pairs_seen": mine[0]["summary"]["pairs_seen"],
            "seconds": statistics.mean(result["summary"]["seconds"] for result in mine),
        }
        for way in WAYS if recall else ():
            row[way] = statistics.mean(result["metrics"][f"{way}_r{recall}"] for result in mine)
        rows.append(row)
    return rows


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """The claims that do not hold: DeCLIP above CLIP, our CLIP at least as good as the plain loop."""
    mean = {(row["set"], row["method"]): row["mean"] for row in rows}
    found = []
    for name in dict.fromkeys(row["set"] for row in rows if row["set"] in SETS):
        if mean[name, "DeCLIP"] <= mean[name, "CLIP"]:
            found.append(f"{name}: DeCLIP {mean[name, 'DeCLIP']:.1f} is not above CLIP {mean[name, 'CLIP']:.1f}")
        if mean[name, "CLIP"] < mean[name, "open_clip loop"]:
            found.append(f"{name}: CLIP {mean[name, 'CLIP']:.1f} is below open_clip {mean[name, 'open_clip loop']:.1f}")
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| set | method | score | text→image | image→text | pairs seen | seconds |", file=sys.stderr)
    print("|---|---|---|---|---|---|---|", file=sys.stderr)
    for row in rows:
        ways = " | ".join(f"{row[way]:.1f}" if way in row else "" for way in WAYS)
        figure = f"{row['mean']:.1f} ± {row['sd']:.1f}"
        cost = f"{row['pairs_seen']:,} | {row['seconds']:.0f}"
        print(f"| {row['set']} | {row['method']} | {figure} | {ways} | {cost} |", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="which settings")
    parser.add_argument("--ablation", action="store_true", help="the ablation on held-out pairs instead")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shared", default="../shared", help="folder that holds data/flickr8k_*.parquet")
    parser.add_argument("--work", type=Path, default=Path("runs/few_pairs"), help="where finished cells are kept")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--json", action="store_true", help="the figures as JSON on stdout")
    parser.add_argument("--check", action="store_true", help="exit 1 where a claim does not hold")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    cells = ablation_cells(args.seeds) if args.ablation else main_cells(args.sets, args.seeds, args.shared)
    results = {}
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(run_cell, cell, args.work, 1): cell for cell in cells}
        for done, future in enumerate(as_completed(futures), 1):
            cell = futures[future]
            results[cell] = future.result()
            recall = SETS[cell.group]["recall"] if cell.group in SETS else 0
            found = score(results[cell], recall)
            print(f"[{done}/{len(cells)}] {cell.group} {cell.method}: {found:.1f}", file=sys.stderr)
    rows = summarise(cells, results)
    print_table(rows)
    problems = [] if args.ablation else missed(rows)
    for problem in problems:
        print(f"MISSED {problem}", file=sys.stderr)
    if args.json:
        print(json.dumps({"rows": rows, "missed": problems}))
    return 1 if args.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())
