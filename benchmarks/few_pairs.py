"""Better from the same pairs: DeCLIP, CLIP and a plain open_clip loop, trained on few pairs and judged on unseen ones.

    python benchmarks/few_pairs.py --peer open_clip --check      # the comparison, hours on two cores
    python benchmarks/few_pairs.py --sets emoji-quarter --check  # one setting; exit 1 where a claim does not hold
    python benchmarks/few_pairs.py --study tuning --seeds 1      # rates and views, both methods, on held-out pairs
    python benchmarks/few_pairs.py --study lengths --seeds 1     # when the held-out score stops rising
    python benchmarks/few_pairs.py --study ablation --seeds 1    # each term and view off
    python benchmarks/few_pairs.py --study methods --seeds 1     # all six methods, and what paper and public code do

Emoji: Noto and Twemoji, judged on Fluent 3D, an artist nobody trained on. Flickr8k: train, judged on dev. All that was
chosen was chosen on held-out pairs (emoji: half of Noto, judged on Twemoji; Flickr8k: a quarter of train, judged on
another tenth of it), never on the test set.
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

from declip.compare.quick import NAMES_AS_THEY_ARE

WAYS = ("text_to_image", "image_to_text")
METHODS = {"CLIP": "clip", "DeCLIP": "declip"}
EMOJI = {
    "train": ["demo:noto", "demo:twemoji"],
    "test": "demo:fluent3d",
    "recall": 1,
    "views": [],
    "clip": [],
    "declip": NAMES_AS_THEY_ARE,
    "tuned": {"clip": [], "declip": []},
}
FLICKR = {
    "train": ["{shared}/data/flickr8k_train.parquet"],
    "test": "{shared}/data/flickr8k_dev.parquet",
    "recall": 10,
    "views": ["data.images.flip=0.5"],  # photos may be mirrored; of emoji, arrows and hands may not
    "clip": [],
    "declip": [],
    "tuned": {"clip": ["optimizer.lr=0.0005"], "declip": []},  # what --study tuning found, method by method
}
SETS: dict[str, dict[str, Any]] = {
    "emoji-quarter": {**EMOJI, "fraction": 0.25},
    "flickr8k-quarter": {**FLICKR, "fraction": 0.25},
    "emoji": {**EMOJI, "fraction": 1.0},
    "flickr8k": {**FLICKR, "fraction": 1.0},
}
PAIRS = 96_000  # seen by each method; half of it as well, where DeCLIP has taken about as long as CLIP with all of it
# Where everything is chosen: pairs of the training sets alone.
HELD_OUT: dict[str, list[str]] = {
    "emoji": ['data.train=["demo:noto"]', 'data.validation=["demo:twemoji"]', "data.fraction=0.5"],
    "flickr8k": ['data.train=["{shared}/data/flickr8k_train.parquet"]', "data.holdout=0.1", "data.fraction=0.25"],
}
CHOOSING = {"emoji": 24_000, "flickr8k": 48_000}  # pairs seen by a run that only chooses
LENGTHS = (24_000, 48_000, 96_000, 192_000)
_COLOURS = "data.images.brightness={0} data.images.contrast={0} data.images.saturation={0} data.images.hue={1}"
TUNING: dict[str, list[str]] = {
    "as shipped": [],
    "no colour changes": ["data.images.jitter=0"],
    "stronger colour changes": ["data.images.jitter=1", *_COLOURS.format(0.5, 0.06).split()],
    "smaller crops, flips": ["data.images.crop_scale=[0.3,1.0]", "data.images.flip=0.5"],
    "half the rate": ["optimizer.lr=0.0005"],
    "twice the rate": ["optimizer.lr=0.002"],
    "five times the weight decay": ["optimizer.weight_decay=0.5"],
    "a ViT of like cost": ["model.image.layers=4", "model.image.width=128"],
}
NO_OTHER_TERMS = [f"terms.{term}.weight=0" for term in ("simsiam", "masked_language", "nearest_neighbour")]
ABLATIONS: dict[str, tuple[str, list[str]]] = {
    "CLIP": ("clip", []),
    "DeCLIP": ("declip", []),
    "without SimSiam": ("declip", NO_OTHER_TERMS[:1]),
    "without masked language": ("declip", NO_OTHER_TERMS[1:2]),
    "without nearest neighbours": ("declip", NO_OTHER_TERMS[2:]),
    "multi-view contrastive alone": ("declip", NO_OTHER_TERMS),
    "the other terms at twice the weight": (
        "declip",
        ["terms.simsiam.weight=0.1", "terms.masked_language.weight=0.2", "terms.nearest_neighbour.weight=0.2"],
    ),
    "the other terms at three times the weight": (
        "declip",
        ["terms.simsiam.weight=0.15", "terms.masked_language.weight=0.3", "terms.nearest_neighbour.weight=0.3"],
    ),
    "both text views from one caption": ("declip", ["data.text.independent=false"]),
    "the caption as it is": ("declip", NAMES_AS_THEY_ARE),
    "the caption augmented": (
        "declip",
        ['terms.contrastive.texts=["augmented","masked"]', 'terms.nearest_neighbour.texts=["augmented"]'],
    ),
}

_REFERENCE_NEIGHBOURS = ["terms.nearest_neighbour.exclude_own=false", "terms.nearest_neighbour.random_start=true"]
_ALL_NEIGHBOURS = 'terms.nearest_neighbour.texts=["augmented","masked"]'
_STRONG_VIEWS = [
    *("data.images.crop_scale=[0.2,1.0]", "data.images.flip=0.5", "data.images.jitter=0.8", "data.images.blur=0.5"),
    *(*_COLOURS.format(0.4, 0.1).split(), "data.images.grayscale=0.2"),
]
_SMALL_VIT = ["model.image.layers=6", "model.image.width=128", "model.image.patch_size=8"]
ALL_METHODS: dict[str, tuple[str, list[str]]] = {
    "CLIP": ("clip", []),
    "SLIP": ("slip", []),
    "FILIP": ("filip", []),
    "DeCLIP": ("declip", []),
    "DeFILIP": ("defilip", []),
    "SigLIP": ("siglip", []),
    "SigLIP, method=paper": ("siglip", ["method=paper"]),
    "DeCLIP, method=paper": ("declip", ["method=paper"]),
    "DeCLIP, method=reference": ("declip", ["method=reference"]),
    "DeCLIP, other pairs of views at half the weight": ("declip", ["terms.contrastive.multi_view=0.5"]),
    "DeCLIP, the code's neighbours": ("declip", [*_REFERENCE_NEIGHBOURS, _ALL_NEIGHBOURS]),
    "DeCLIP, the code's image views": ("declip", _STRONG_VIEWS),
    "DeCLIP, logit scale at least 20": ("declip", ["model.logit_scale_range=[3.0,4.6052]"]),
    "DeFILIP, a small ViT": ("defilip", _SMALL_VIT),
    "FILIP, padding counts": ("filip", ["terms.token_wise.mask_padding=false"]),
    "FILIP, 16 tokens": ("filip", ["terms.token_wise.top_k=16"]),
    "FILIP, masked words": ("filip", ['terms.token_wise.texts=["masked"]']),
}


@dataclass(frozen=True)
class Cell:
    """One training run: which method, on which pairs, how long, which seed."""

    group: str
    method: str
    base: str
    overrides: tuple[str, ...]
    test: str | None
    pairs: int = 0
    peer: bool = False

    def key(self) -> str:
        from declip.recipe import load_recipe, to_toml

        text = to_toml(load_recipe(self.base, list(self.overrides))) + f"{self.test} {self.peer}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def comparison_cells(names: list[str], seeds: int, half_seeds: int, shared: str, peer: bool) -> list[Cell]:
    """Every cell, seed by seed, so that a stopped run has whole rows; then the half lengths, the peer last."""
    wanted = [(*cell, PAIRS) for cell in product(range(seeds), names, METHODS.items())]
    halves = METHODS | ({"open_clip loop": "clip"} if peer else {})
    wanted += [
        (seed, name, method, PAIRS // 2) for method, seed, name in product(halves.items(), range(half_seeds), names)
    ]
    cells = []
    for seed, name, (method, base), pairs in wanted:
        options = SETS[name]
        overrides = (
            f"data.train={json.dumps([path.format(shared=shared) for path in options['train']])}",
            "data.holdout=0",
            f"data.fraction={options['fraction']}",
            f"data.fraction_seed={seed}",
            f"schedule.pairs_seen={pairs}",
            f"seed={seed}",
            *options["views"],
            *options[base],
            *options["tuned"][base],
        )
        test = options["test"].format(shared=shared)
        cells.append(Cell(name, method, base, overrides, test, pairs, method == "open_clip loop"))
    return cells


def held_out_cells(study: str, names: list[str], seeds: int, shared: str, seen: int | None = None) -> list[Cell]:
    """The cells of a study on held-out pairs; `seen` pairs instead of CHOOSING's."""
    rows: list[tuple[str, str, list[str]]]
    if study == "tuning":
        rows = [
            (f"{method}, {what}", base, changes)
            for (what, changes), (method, base) in product(TUNING.items(), METHODS.items())
        ]
    elif study == "lengths":
        rows = [
            (f"{method}, {pairs:,} pairs", base, [f"schedule.pairs_seen={pairs}"])
            for pairs, (method, base) in product(LENGTHS, METHODS.items())
        ]
    else:
        rows = [(name, *changes) for name, changes in (ABLATIONS if study == "ablation" else ALL_METHODS).items()]
    cells = []
    for seed, name, (method, base, changes) in product(range(seeds), names, rows):
        common = [option.format(shared=shared) for option in HELD_OUT[name]]
        own = [] if study == "methods" else SETS[name].get(base, [])
        common += SETS[name]["views"] + own + ([] if study == "tuning" else SETS[name]["tuned"].get(base, []))
        common += [f"schedule.pairs_seen={seen or CHOOSING[name]}", "evaluation.every=0.25", f"seed={seed}"]
        cells.append(Cell(f"{study}, {name}", method, base, (*common, *changes), None))
    return cells


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
    for row_of in dict.fromkeys((cell.group, cell.method, cell.pairs) for cell in cells):
        mine = [results[cell] for cell in cells if (cell.group, cell.method, cell.pairs) == row_of]
        group, method, asked = row_of
        recall = SETS[group]["recall"] if group in SETS else 0
        scores = [score(result, recall) for result in mine]
        row = {
            "set": group,
            "method": method,
            "recall": recall,
            "by_seed": scores,
            "mean": statistics.mean(scores),
            "sd": statistics.stdev(scores) if len(scores) > 1 else 0.0,
            "asked": asked,
            "pairs_seen": mine[0]["summary"]["pairs_seen"],
            "seconds": statistics.mean(result["summary"]["seconds"] for result in mine),
        }
        for way in WAYS if recall else ():
            row[way] = statistics.mean(result["metrics"][f"{way}_r{recall}"] for result in mine)
        rows.append(row)
    return rows


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """The claims that do not hold: DeCLIP above CLIP at each length, our CLIP at least as good as the plain loop."""
    mean = {(row["set"], row["asked"], row["method"]): row["mean"] for row in rows}
    found = []
    for name, pairs in dict.fromkeys((row["set"], row["asked"]) for row in rows):
        scores = {method: mean.get((name, pairs, method)) for method in (*METHODS, "open_clip loop")}
        where, clip, declip, peer = f"{name}, {pairs:,} pairs", *scores.values()
        if declip <= clip:
            found.append(f"{where}: DeCLIP {declip:.1f} is not above CLIP {clip:.1f}")
        if peer is not None and clip < peer:
            found.append(f"{where}: CLIP {clip:.1f} is below the open_clip loop {peer:.1f}")
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| set | method | score | by seed | text→image | image→text | pairs seen | seconds |", file=sys.stderr)
    print("|---|---|---|---|---|---|---|---|", file=sys.stderr)
    for row in rows:
        ways = " | ".join(f"{row[way]:.1f}" if way in row else "" for way in WAYS)
        figure = f"{row['mean']:.1f} ± {row['sd']:.1f} | {', '.join(f'{score:.1f}' for score in row['by_seed'])}"
        cost = f"{row['pairs_seen']:,} | {row['seconds']:.0f}"
        print(f"| {row['set']} | {row['method']} | {figure} | {ways} | {cost} |", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--study", choices=("comparison", "tuning", "lengths", "ablation", "methods"), default="comparison"
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, help="which settings (default: all of the study's)")
    parser.add_argument("--peer", choices=["open_clip"], help="train a plain open_clip loop too")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every cell (%(default)s)")
    parser.add_argument(
        "--half-seeds", type=int, default=1, help="seeds at half the length, and of the peer (%(default)s)"
    )
    parser.add_argument("--pairs", type=int, help="pairs seen by the runs of --study tuning and ablation")
    parser.add_argument("--shared", default="../shared", help="folder that holds data/flickr8k_*.parquet")
    parser.add_argument("--work", type=Path, default=Path("runs/few_pairs"), help="where finished cells are kept")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--json", action="store_true", help="the figures as JSON on stdout")
    parser.add_argument("--check", action="store_true", help="exit 1 where a claim does not hold")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    comparison = args.study == "comparison"
    names = [name for name in SETS if (comparison or name in HELD_OUT) and name in (args.sets or SETS)]
    if comparison:
        cells = comparison_cells(names, args.seeds, args.half_seeds, args.shared, args.peer is not None)
    else:
        cells = held_out_cells(args.study, names, args.seeds, args.shared, args.pairs)
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
    problems = missed(rows) if comparison else []
    for problem in problems:
        print(f"MISSED {problem}", file=sys.stderr)
    if args.json:
        print(json.dumps({"rows": rows, "missed": problems}))
    return 1 if args.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())
