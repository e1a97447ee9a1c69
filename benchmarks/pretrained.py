"""From pretrained towers: `declip finetune` beside the plain contrastive fine-tune, same towers, pairs and minutes.

    python benchmarks/pretrained.py --parts ten-minutes --check     # Flickr8k, hours for all parts and three seeds
    python benchmarks/pretrained.py --parts caching --check         # a step with and without what is kept
    python benchmarks/pretrained.py --seeds 1 --parts small emoji   # 500, 1,000, 2,000 pairs; emoji at 64 px
    python benchmarks/pretrained.py --seeds 1 --parts rates ways    # what the rules of docs/finetuning.md rest on
    python benchmarks/pretrained.py --seeds 1 --parts muon          # whether Muon wins here too
    python benchmarks/pretrained.py --seeds 1 --parts joint         # the same for a whole model, and what it forgets

Towers: EfficientNet-Lite0 (--weights) and MiniLM (--text, a Hugging Face folder). Flickr8k: train, judged on dev; what
`declip finetune` chooses, it chooses on pairs of train that it holds out. The peer is open_clip's recipe: both towers
learn at 5e-4, weight decay 0.2, batches of 64, crops of 0.9 to 1, a caption a row, a cosine over the minutes; its
10,000 steps of warm-up, which would be longer than the whole run, are a tenth of it. It runs in our loop, which is
faster than open_clip's own, and has learnt from all pairs where ours holds a tenth of them out.
Finished cells are kept under --work, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECALLS = ("text_to_image_r1", "image_to_text_r1")
FLICKR = ("{shared}/data/flickr8k_train.parquet",), "{shared}/data/flickr8k_dev.parquet", 224
EMOJI = ("demo:noto", "demo:twemoji"), "demo:fluent3d", 64
PEER = [
    *("optimizer.lr=5e-4", "optimizer.weight_decay=0.2", "optimizer.eps=1e-6", "schedule.batch_size=64"),
    *("data.images.crop_scale=[0.9,1.0]", "data.text.pool=each", "schedule.warmup=0.1", "optimizer.clip_norm=0"),
    "data.holdout=0",
]


@dataclass(frozen=True)
class Cell:
    """One run: of whom, on what, for how long."""

    who: str  # declip, peer, joint: a whole model, that of ten minutes on Flickr8k, goes on
    data: tuple[tuple[str, ...], str, int]  # what it learns from, what it is judged on, side of the pictures
    minutes: float  # 0: EPOCHS of the last layers
    fraction: float = 1.0
    seed: int = 0
    changes: tuple[str, ...] = ()  # of what the rules choose
    held_out: bool = False  # judged on the pairs of train that finetune holds out

    @property
    def name(self) -> str:
        judged_on = Path(self.data[1]).stem.replace(":", "-")
        changes = "".join(f"-{change.replace('/', '_')}" for change in self.changes)
        return f"{self.who}{changes}-{judged_on}-{self.fraction:.4f}-{self.minutes:g}min-{self.seed}"


def cells(part: str, seeds: int) -> list[Cell]:
    """What a part of the benchmark runs."""
    found = []
    for seed in range(seeds):
        if part == "ten-minutes":
            found += [Cell("declip", FLICKR, 10, seed=seed), Cell("peer", FLICKR, 10, seed=seed)]
        elif part == "quarter":
            found += [Cell("declip", FLICKR, 10, fraction, seed) for fraction in (0.25, 0.5)]
        elif part == "hour":
            found += [Cell("declip", FLICKR, 60, seed=seed), Cell("peer", FLICKR, 60, seed=seed)]
        elif part == "small":
            found += [Cell(who, FLICKR, 3, n / 6000, seed) for n in (500, 1000, 2000) for who in ("declip", "peer")]
        elif part == "ways":
            found += [Cell("declip", FLICKR, 6, seed=seed, changes=changes, held_out=True) for changes in WAYS]
        elif part == "rates":
            found += [Cell("declip", FLICKR, 0, 0.25, seed, changes, held_out=True) for changes in RATES]
        elif part == "muon":
            found += [Cell("declip", FLICKR, 0, 0.25, seed, changes, held_out=True) for changes in MUON]
        elif part == "joint":
            found += [Cell("joint", EMOJI, 3, 0.25, seed, changes) for changes in JOINT]
        elif part == "emoji":
            found += [Cell("declip", EMOJI, 5, seed=seed), Cell("peer", EMOJI, 5, seed=seed)]
    return found


WAYS: list[tuple[str, ...]] = [
    ("model.image.tune=projection", "model.text.tune=projection"),
    ("model.image.tune=projection",),
    (),
    ("model.image.tune=all", "model.text.tune=all"),
]
"""What learns; in equal minutes, judged on the tenth of train that finetune holds out, never on dev."""
RATES: list[tuple[str, ...]] = [
    (),
    ("optimizer.image_lr=3e-4",),
    ("optimizer.image_lr=1e-3", "optimizer.lr=5e-4"),
    ("optimizer.layer_decay=1.0",),
    ("optimizer.weight_decay=0.2",),
    ("model.freeze_batch_norm=false",),
    ("data.view_size=none",),
    ("data.images.crop_scale=[0.9,1.0]",),
    ("data.images.jitter=0.8",),
    ("data.mix=0",),
    ("optimizer.ema=0",),
    ("model.image.classes=none",),
    ("model.logit_scale_init=2.6593",),
    ("model.logit_scale_init=1.5",),
    ("schedule.batch_size=64",),
    ("terms.nearest_neighbour.weight=0.2",),
]
"""The rest of the rules' choices, one changed at a time; of a quarter of the pairs in equal epochs, judged as WAYS."""
MUON: list[tuple[str, ...]] = [
    (),
    *(
        ("optimizer.kind=muon", f"optimizer.lr={lr}", f"optimizer.image_lr={2 * lr}", "optimizer.projection_lr=4e-3")
        for lr in (1e-4, 3e-4, 1e-3)
    ),
    ("optimizer.lr=5e-4", "optimizer.image_lr=1e-3", "schedule.epochs=18"),  # AdamW for as long as Muon takes
]
"""What wins from scratch (docs/data-efficiency.md), where layers learn that have learnt already; judged as RATES."""
EPOCHS = [
    *("schedule.epochs=12", "evaluation.every=0.5", "model.image.views_kept=4"),
    *("model.image.tune=last", "model.image.tune_layers=5", "model.text.tune=last", "model.text.tune_layers=3"),
]
JOINT: list[tuple[str, ...]] = [
    (),
    ("optimizer.lr=1e-4",),
    ("optimizer.lr=1e-6",),
    ("optimizer.start_decay=0",),
    ("evaluation.interpolate=false",),
    ("optimizer.lr=1e-4", "optimizer.start_decay=0", "evaluation.interpolate=false"),
    ("model.image.tune=lora", "model.text.tune=lora", "optimizer.lr=1e-4"),
]
"""The same for a whole model: judged on emoji of an artist not seen, and on dev, which it shall not forget."""


class Bench:
    """Runs cells and reads what they gave."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work, self.shared, self.weights, self.text = args.work, args.shared, args.weights, args.text

    def run(self, cell: Cell) -> dict[str, Any]:
        """A cell's figures, from its file where it has been run."""
        place = self.work / f"{cell.name}.json"
        if not place.is_file():
            print(f"{cell.name} …", file=sys.stderr, flush=True)
            place.write_text(json.dumps(self._measure(cell), indent=1))
        found: dict[str, Any] = json.loads(place.read_text())
        return found

    def _measure(self, cell: Cell) -> dict[str, Any]:
        out, cache = self.work / cell.name, self.work / "cache"
        for folder in (out, cache) if cell.minutes else (out,):  # where time counts, a cell computes all it keeps
            shutil.rmtree(folder, ignore_errors=True)
        sources = [spec.format(shared=self.shared) for spec in cell.data[0]]
        test, size = cell.data[1].format(shared=self.shared), cell.data[2]
        if cell.who == "joint":
            return self._go_on(cell, sources, test, out)
        common = [*self.towers(size), f"data.fraction={cell.fraction}", f"seed={cell.seed}"]
        began = time.perf_counter()
        if cell.who == "declip":
            towers = f"{self.weights}+{self.text}"
            given = [*cell.changes, "--minutes", f"{cell.minutes:g}"] if cell.minutes else [*EPOCHS, *cell.changes]
            told = self.declip("finetune", towers, *sources, *common, *given, "--out", str(out))
        else:
            started = [f"model.image.init={self.weights}", f"model.text.init={self.text}", *common, *PEER]
            given = [f"data.train={sources!r}", f"data.validation={[test]!r}", *started]
            estimate = self.declip("train", "clip", *given, "--dry-run")
            # All its minutes are for training: scores for its curve come on top.
            steps = max(20, int(60 * cell.minutes / estimate["seconds_per_step"]))
            began = time.perf_counter()
            length = f"schedule.pairs_seen={64 * steps}", "evaluation.every=0.125"
            self.declip("train", "clip", *given, *length, "--out", str(out))
        seconds = time.perf_counter() - began
        rows = held_out_rows(out)
        if cell.held_out:
            figures = {name: told["results"][0]["after"][name] for name in RECALLS}
            return {**figures, "seconds": seconds, "curve": curve(rows)}
        figures = self.recalls(self.declip("evaluate", str(out), test, "--task", "retrieval"))
        if cell.who == "peer":  # which has no held-out pairs to choose by: the last weights count
            figures = {name: rows[-1]["held_out"][name] for name in RECALLS}
        return {**figures, "seconds": seconds, "curve": curve(rows)}

    def _go_on(self, cell: Cell, sources: list[str], test: str, out: Path) -> dict[str, Any]:
        """Fine-tune the model of ten minutes on Flickr8k; what it still knows of Flickr8k's dev is reported too."""
        first = Cell("declip", FLICKR, 10, seed=cell.seed)
        self.run(first)
        known = FLICKR[1].format(shared=self.shared)
        given = [f"data.fraction={cell.fraction}", f"seed={cell.seed}", *cell.changes]
        given += ["--minutes", f"{cell.minutes:g}", "--general", known, "--out", str(out)]
        began = time.perf_counter()
        told = self.declip("finetune", str(self.work / first.name), *sources, *given)
        seconds = time.perf_counter() - began
        general = told["results"][1]  # behind the pairs that finetune holds out
        knew = {f"dev_{name}_{when}": general[when][name] for name in RECALLS for when in ("before", "after")}
        return {
            **self.recalls(self.declip("evaluate", str(out), test, "--task", "retrieval")),
            **knew,
            "seconds": seconds,
            "curve": curve(held_out_rows(out)),
        }

    def towers(self, size: int) -> list[str]:
        return [f"model.image.image_size={size}", "model.image.timm_model_name=tf_efficientnet_lite0"]

    def recalls(self, judged: dict[str, Any]) -> dict[str, float]:
        metrics = judged["results"][0]["metrics"]
        return {name: metrics[name] for name in RECALLS}

    def declip(self, *arguments: str) -> dict[str, Any]:
        environment = {**os.environ, "XDG_CACHE_HOME": str(self.work / "cache")}
        command = [sys.executable, "-m", "declip", *arguments, "--json"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def caching(self) -> dict[str, float]:
        """Seconds of a step of 256 pairs with both towers locked, and with what is kept of them switched off."""
        locked = ["model.image.tune=projection", "model.text.tune=projection", "schedule.batch_size=256"]
        given = [f"data.train={self.shared}/data/flickr8k_train.parquet", "data.holdout=0", *self.towers(192), *locked]
        given += [f"model.image.init={self.weights}", f"model.text.init={self.text}"]
        kept = self.declip("train", "clip", *given, "--dry-run")
        computed = self.declip(
            "train", "clip", *given, "model.image.views_kept=0", "model.text.kept=false", "--dry-run"
        )
        return {"kept": kept["seconds_per_step"], "computed": computed["seconds_per_step"]}


def held_out_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics with scores of held-out pairs."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "held_out" in row]


def curve(rows: list[dict[str, Any]]) -> list[list[float]]:
    """Pairs seen and held-out score, by score."""
    return [[row["pairs"], row["held_out"]["score"]] for row in rows]


def mean(found: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(one[name] for one in found)


def summary(bench: Bench, parts: list[str], seeds: int) -> tuple[dict[str, Any], dict[str, bool]]:
    """Figures by cell without its seed, and whether each target is met."""
    figures: dict[str, Any] = {}
    targets: dict[str, bool] = {}
    for part in parts:
        if part == "caching":
            figures[part] = bench.caching()
            targets["a step with kept features takes a fifth of the time at most"] = (
                5 * figures[part]["kept"] <= figures[part]["computed"]
            )
            continue
        by_name: dict[str, list[dict[str, Any]]] = {}
        for cell in cells(part, seeds):
            by_name.setdefault(cell.name.rpartition("-")[0], []).append(bench.run(cell))
        for name, found in by_name.items():
            means = {key: mean(found, key) for key in found[0] if key != "curve"}
            ends = statistics.mean(one["curve"][-1][1] / max(score for _, score in one["curve"]) for one in found)
            figures[name] = {**means, "last_of_best": ends, "seeds": len(found)}
        targets |= _targets(part, figures)
    return figures, targets


def _targets(part: str, figures: dict[str, Any]) -> dict[str, bool]:
    asked = {"ten-minutes": (22, 28), "hour": (28, 36)}
    minutes = {"ten-minutes": 10, "hour": 60}.get(part)
    ours = {name: own for name, own in figures.items() if name.startswith("declip")}
    if minutes is not None:
        own = figures[f"declip-flickr8k_dev-1.0000-{minutes}min"]
        peer = figures[f"peer-flickr8k_dev-1.0000-{minutes}min"]
        return {
            f"{part}: {asked[part][0]} and {asked[part][1]}": all(
                own[recall] >= least for recall, least in zip(RECALLS, asked[part], strict=True)
            ),
            f"{part}: in {minutes} minutes": own["seconds"] <= 60 * minutes,
            f"{part}: a fifth above the peer": all(own[recall] >= 1.2 * peer[recall] for recall in RECALLS),
        }
    if part == "quarter" and (peer := figures.get("peer-flickr8k_dev-1.0000-10min")):
        own = figures["declip-flickr8k_dev-0.2500-10min"]
        return {"a quarter of the pairs does as the peer with all": all(own[r] >= peer[r] for r in RECALLS)}
    if part == "small":
        small = {name: own for name, own in ours.items() if name.endswith("-3min")}
        return {f"{name}: ends within 5% of its best": own["last_of_best"] >= 0.95 for name, own in small.items()}
    return {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["ten-minutes", "quarter", "small", "caching", "emoji", "hour"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--weights", type=Path, help="EfficientNet-Lite0 (default: that of --shared)")
    parser.add_argument("--text", type=Path, required=True, help="folder of MiniLM in Hugging Face's format")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrained"), help="finished cells (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    args = parser.parse_args()
    args.weights = args.weights or args.shared / "weights/tf_efficientnet_lite0.fp16.safetensors"
    args.work.mkdir(parents=True, exist_ok=True)
    figures, targets = summary(Bench(args), args.parts, args.seeds)
    if args.json:
        print(json.dumps({"figures": figures, "targets": targets}, indent=1))
    else:
        for name, own in figures.items():
            print(name, " ".join(f"{key}={value:.4g}" for key, value in own.items()))
        for name, met in targets.items():
            print("met   " if met else "MISSED", name)
    return int(args.check and not all(targets.values()))


if __name__ == "__main__":
    sys.exit(main())
