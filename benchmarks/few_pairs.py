"""Better from the same pairs: DeCLIP, CLIP and a plain open_clip loop, trained on few pairs and judged on unseen ones.

    python benchmarks/few_pairs.py --peer open_clip --check      # the comparison, hours on two cores
    python benchmarks/few_pairs.py --sets emoji-quarter --check  # one setting; exit 1 where a claim does not hold
    python benchmarks/few_pairs.py --study tuning --seeds 1      # rates and views, both methods, on held-out pairs
    python benchmarks/few_pairs.py --study lengths --seeds 1     # when the held-out score stops rising
    python benchmarks/few_pairs.py --study ablation --seeds 1    # each term and view off

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

WAYS = ("text_to_image", "image_to_text")
METHODS = {"CLIP": "clip", "DeCLIP": "declip"}
EMOJI = {"train": ["demo:noto", "demo:twemoji"], "test": "demo:fluent3d", "recall": 1, "options": []}
FLICKR = {
    "train": ["{shared}/data/flickr8k_train.parquet"],
    "test": "{shared}/data/flickr8k_dev.parquet",
    "recall": 10,
    "options": ["data.images.flip=0.5"],  # photos may be mirrored; of emoji, arrows and hands may not
}
SETS: dict[str, dict[str, Any]] = {
    "emoji": {**EMOJI, "fraction": 1.0, "pairs": 48_000},
    "emoji-quarter": {**EMOJI, "fraction": 0.25, "pairs": 32_000},
    "flickr8k": {**FLICKR, "fraction": 1.0, "pairs": 48_000},
    "flickr8k-quarter": {**FLICKR, "fraction": 0.25, "pairs": 40_000},
}
# A DeCLIP step takes about so many times as long as a CLIP step: "in CLIP's time" DeCLIP sees as many fewer pairs.
STEP_RATIO = 1.85
# Where everything is chosen: pairs of the training sets alone.
HELD_OUT: dict[str, list[str]] = {
    "emoji": ['data.train=["demo:noto"]', 'data.validation=["demo:twemoji"]', "data.fraction=0.5"],
    "flickr8k": ['data.train=["{shared}/data/flickr8k_train.parquet"]', "data.holdout=0.1", "data.fraction=0.25"],
}
CHOOSING = 24_000  # pairs seen by a run that only chooses
LENGTHS = (24_000, 48_000, 96_000)
_COLOURS = "data.images.brightness={0} data.images.contrast={0} data.images.saturation={0} data.images.hue={1}"
TUNING: dict[str, list[str]] = {
    "as shipped": [],
    "no colour changes": ["data.images.jitter=0"],
    "stronger colour changes": ["data.images.jitter=1", *_COLOURS.format(0.5, 0.06).split()],
    "smaller crops, flips": ["data.images.crop_scale=[0.3,1.0]", "data.images.flip=0.5"],
    "twice the rate": ["optimizer.lr=0.002"],
}
NO_OTHER_TERMS = [f"terms.{term}.weight=0" for term in ("simsiam", "masked_language", "nearest_neighbour")]
ABLATIONS: dict[str, tuple[str, list[str]]] = {
    "CLIP": ("clip", []),
    "DeCLIP": ("declip", []),
    "without SimSiam": ("declip", NO_OTHER_TERMS[:1]),
    "without masked language": ("declip", NO_OTHER_TERMS[1:2]),
    "without nearest neighbours": ("declip", NO_OTHER_TERMS[2:]),
    "multi-view contrastive alone": ("declip", NO_OTHER_TERMS),
    "both text views from one caption": ("declip", ["data.text.independent=false"]),
    "without the masked text as a view": ("declip", ['terms.contrastive.texts=["caption"]']),
    "the caption augmented": (
        "declip",
        ['terms.contrastive.texts=["augmented","masked"]', 'terms.nearest_neighbour.texts=["augmented"]'],
    ),
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


def comparison_cells(names: list[str], seeds: int, shared: str, peer: bool) -> list[Cell]:
    """Every cell, the comparison of the two methods first, so that a stopped run has whole rows."""
    rounds = [{"CLIP": 1.0, "DeCLIP": 1.0}, {"DeCLIP in CLIP's time": 1 / STEP_RATIO}]
    cells = []
    for methods in [*rounds, {"open_clip loop": 1.0}] if peer else rounds:
        for seed, name, (method, share) in product(range(seeds), names, methods.items()):
            options = SETS[name]
            overrides = (
                f"data.train={json.dumps([path.format(shared=shared) for path in options['train']])}",
                "data.holdout=0",
                f"data.fraction={options['fraction']}",
                f"data.fraction_seed={seed}",
                f"schedule.pairs_seen={round(options['pairs'] * share)}",
                f"seed={seed}",
                *options["options"],
            )
            base = "declip" if method.startswith("DeCLIP") else "clip"
            test = options["test"].format(shared=shared)
            cells.append(Cell(name, method, base, overrides, test, peer=method == "open_clip loop"))
    return cells


def held_out_cells(study: str, names: list[str], seeds: int, shared: str) -> list[Cell]:
    """The cells of a study on held-out pairs: tuning, lengths or ablation."""
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
        rows = [(name, *ablation) for name, ablation in ABLATIONS.items()]
    cells = []
    for seed, name, (method, base, changes) in product(range(seeds), names, rows):
        common = [option.format(shared=shared) for option in HELD_OUT[name]]
        common += SETS[name]["options"]
        common += [f"schedule.pairs_seen={CHOOSING}", "evaluation.every=0.25", f"seed={seed}"]
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
        if (name, "open_clip loop") in mean and mean[name, "CLIP"] < mean[name, "open_clip loop"]:
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
    parser.add_argument("--study", choices=("comparison", "tuning", "lengths", "ablation"), default="comparison")
    parser.add_argument("--sets", nargs="+", choices=SETS, help="which settings (default: all of the study's)")
    parser.add_argument("--peer", choices=["open_clip"], help="train a plain open_clip loop too")
    parser.add_argument("--seeds", type=int, default=3)
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
        cells = comparison_cells(names, args.seeds, args.shared, peer=args.peer is not None)
    else:
        cells = held_out_cells(args.study, names, args.seeds, args.shared)
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
