"""What a pair is worth: CLIP, DeCLIP and `best-small` on fractions of the pairs, three seeds each.

    python benchmarks/data_efficiency.py --sets emoji --check           # an artist nobody trained on; hours
    python benchmarks/data_efficiency.py --sets concepts flickr8k       # concepts nobody trained on; photos
    python benchmarks/data_efficiency.py --sets pretrained --weights W --text T   # from pretrained towers
    python benchmarks/data_efficiency.py --sets emoji --study parts     # what each part of best-small adds, a quarter
    python benchmarks/data_efficiency.py --sets emoji --study added     # what else would add to it
    python benchmarks/data_efficiency.py --sets emoji --study views     # which augmentations help and which hurt
    python benchmarks/data_efficiency.py --sets emoji --study terms     # what DeCLIP's terms add, a queue, a fading
    python benchmarks/data_efficiency.py --sets pretrained --study projections …   # what wins from scratch, on towers

The learning rate of every method is searched, the weights of every run are those that were best on pairs held out of
training, and nothing is chosen on what is judged. Finished cells are kept under --work; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from declip.compare.quick import NAMES_AS_THEY_ARE

METHODS = ["clip", "declip", "best-small"]
OTHERS = ["slip", "filip", "defilip", "siglip", "cosmos", "best"]
BEST = METHODS[-1]
NAMES = [f"declip:{change.replace(' ', '')}" for change in NAMES_AS_THEY_ARE]
PHOTOS = ["data.images.flip=0.5"]  # photos may be mirrored; of emoji, arrows and hands may not
# Both towers rest, and what they give is computed once: only their projections learn, so that a run costs seconds.
TOWERS = [
    f"efficientnet-lite0-minilm:{change}"
    for change in (
        "model.image.init={weights}",
        "model.image.timm_model_name=tf_efficientnet_lite0",
        "model.text.init={text}",
        "model.image.tune=projection",
        "model.text.tune=projection",
        "model.image.views_kept=4",
        'terms.contrastive.texts=["caption"]',
    )
]
WANTED = {"declip": 1.5, "best-small": 3.0, "efficientnet-lite0-minilm": 13.0}


@dataclass(frozen=True)
class Set:
    """What is trained on, judged on, and changed of the recipes."""

    data: list[str]
    judged: list[str]
    changes: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=lambda: METHODS)
    options: list[str] = field(default_factory=list)
    folder: str | None = None  # of its cells, where another set has some of them


SETS = {
    # Six keycaps and signs of the third artist look much like another's; that is reported.
    "emoji": Set(["demo:noto", "demo:twemoji"], ["demo:fluent3d"], NAMES, options=["--allow-overlap"]),
    # Concepts are set aside by their code point. Flags of different places can look alike; that is reported.
    "concepts": Set(["demo:noto", "demo:twemoji"], [], NAMES, options=["--key", "codepoint", "--allow-overlap"]),
    "flickr8k": Set(["{shared}/data/flickr8k_train.parquet"], ["{shared}/data/flickr8k_dev.parquet"], PHOTOS),
    "pretrained": Set(
        ["{shared}/data/flickr8k_train.parquet"],
        ["{shared}/data/flickr8k_dev.parquet"],
        [*PHOTOS, *TOWERS],
        ["clip", "efficientnet-lite0-minilm"],
        ["--no-equal-compute"],
        "flickr8k",
    ),
}
PARTS = [
    "optimizer.kind=adamw optimizer.lr=1e-3",
    'terms.contrastive.images=1 terms.contrastive.texts=["single"]',
    'terms.contrastive.images=2 terms.contrastive.texts=["single"]',
    "terms.simclr.weight=0",
    "model.logit_scale_init=2.6593 model.logit_scale_range=[0.0,4.6052]",
    "data.images.crop_scale=[0.5,1.0]",
    "data.images.jitter=0",
    "data.images.hue=0.03",
    "evaluation.tolerance=0",
]
"""What is left out of best-small, one at a time."""
ADDED = [
    "optimizer.ema_half_life=0.05",
    "optimizer.weight_decay=0",
    "model.image.drop_path=0.1 model.text.drop_path=0.1",
    "data.mix=0.3 terms.simclr.weight=0",
    "terms.simsiam.weight=0.05 terms.simsiam.width=256 terms.simsiam.bottleneck=64",
    "terms.masked_language.weight=0.1 terms.masked_language.vocabulary=used",
    "terms.nearest_neighbour.weight=0.1 terms.nearest_neighbour.queue_size=4096 "
    'terms.nearest_neighbour.texts=["single"]',
    'optimizer.ema_half_life=0.05 terms.teacher_contrast.texts=["single","single_2"]',
]
"""What is put in, one at a time."""
VIEWS = [
    "data.images.convolve=0.5",
    "data.images.grayscale=0.2",
    "data.images.blur=0.5",
    "data.images.flip=0.5",
    "data.images.crop_scale=[0.2,1.5]",
    "data.images.crop_scale=[0.5,2.0]",
    "data.images.crop_scale=[0.8,1.2]",
]
"""Changes of how a picture's views are made, one at a time."""
TERMS = [
    "terms.simsiam.weight=0",
    "terms.masked_language.weight=0",
    "terms.nearest_neighbour.weight=0",
    "terms.simsiam.weight=0 terms.masked_language.weight=0 terms.nearest_neighbour.weight=0",
    "terms.nearest_neighbour.queue_size=256",
    "terms.nearest_neighbour.top_k=3",
    "terms.simsiam.fade_from=0.3 terms.masked_language.fade_from=0.3 terms.nearest_neighbour.fade_from=0.3",
    "data.images.crop_scale=[0.5,1.5]",
]
"""What is left out of DeCLIP or set otherwise, one at a time."""
PROJECTIONS = [
    "optimizer.projection_lr=2e-3",
    "optimizer.kind=muon",
    "optimizer.kind=muon optimizer.projection_lr=4e-3",
    "optimizer.kind=muon optimizer.projection_lr=1.6e-2",
    "data.mix=0",
    "data.mix=0 terms.simclr.weight=0.2",
    "terms.contrastive.images=2",
]
"""Of projections on resting towers: what wins from scratch."""
STUDIES = {
    "parts": (BEST, PARTS),
    "added": (BEST, ADDED),
    "views": (BEST, VIEWS),
    "terms": ("declip", TERMS),
    "projections": ("efficientnet-lite0-minilm", PROJECTIONS),
}


def command(name: str, args: argparse.Namespace) -> list[str]:
    """The `declip compare` of a set."""
    chosen = SETS[name]
    places = {"shared": args.shared, "weights": args.weights, "text": args.text}

    def put(texts: list[str]) -> list[str]:
        return [text.format(**places) if "{" in text else text for text in texts]

    judged = ["--eval", *put(chosen.judged)] if chosen.judged else []
    studied, rows = STUDIES.get(args.study, ("", []))
    methods = [studied] if studied else args.methods or chosen.methods
    changes = [
        one for one in put(chosen.changes) if one.partition(":")[0] in methods or ":" not in one.partition("=")[0]
    ]
    line = [*methods, *changes, "--data", *put(chosen.data), *judged, *chosen.options]
    out = args.work / (chosen.folder or name)
    line += ["--seeds", str(args.seeds), "--pairs-seen", str(args.pairs), "--out", str(out)]
    if args.study == "curves":
        unequal = ["--no-equal-compute"] * args.no_equal_compute
        return [*line, "--fractions", args.fractions, "--rates", args.rates, *unequal]
    variants = [option for change in rows for option in ("--variant", f"{studied} {change}")]
    return [*line, "--fractions", "1/4", "--rates", "1", "--no-equal-compute", *variants]


def missed(name: str, result: dict[str, Any]) -> list[str]:
    """The promises that a set's curves do not keep."""
    found = []
    most = max(result["pairs"].values())
    for factor in result["factors"]:
        method, top = factor["method"], factor["read_off"] == "base" and factor["pairs"] == most
        wanted = WANTED.get(method)
        if wanted and top and factor["view"] == "pairs seen" and (factor["factor"] or 0.0) < wanted:
            found.append(f"{name}, {factor['judged']}: {method} has factor {factor['factor']}, promised {wanted}")
    at = {
        (line["judged"], line["method"], point["fraction"]): point["quality"]
        for line in result["lines"]
        if line["view"] == "compute"
        for point in line["points"]
    }
    for (judged, method, fraction), quality in at.items():
        base = at[judged, result["base"], fraction]
        if method == BEST and fraction != "1" and quality < base:
            found.append(f"{name}, {judged}: at equal compute and {fraction} {method} {quality:.1f}, CLIP {base:.1f}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["emoji"], help="what is trained and judged on")
    parser.add_argument("--study", choices=("curves", *STUDIES), default="curves")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *OTHERS], help="(all of the set's)")
    parser.add_argument("--rates", default="0.5,1,2", help="times each recipe's own, searched (%(default)s)")
    parser.add_argument("--no-equal-compute", action="store_true", help="runs of equal pairs seen alone")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--pairs", type=int, default=48_000, help="seen by each run (%(default)s)")
    parser.add_argument("--fractions", default="1,1/2,1/4,1/8,1/16", help="(%(default)s)")
    parser.add_argument("--shared", default="../shared", help="folder that holds data/flickr8k_*.parquet")
    parser.add_argument("--weights", default="", help="EfficientNet-Lite0's weight file")
    parser.add_argument("--text", default="", help="MiniLM's folder")
    parser.add_argument("--work", type=Path, default=Path("runs/data_efficiency"), help="where cells are kept")
    parser.add_argument("--json", action="store_true", help="the figures as JSON on stdout")
    parser.add_argument("--check", action="store_true", help="exit 1 where a promise is not kept")
    args = parser.parse_args()
    results, problems = {}, []
    for name in args.sets:
        line = [sys.executable, "-m", "declip", "compare", *command(name, args), "--json"]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return done.returncode
        results[name] = json.loads(done.stdout)
        if "factors" not in results[name]:  # stopped by a signal: what is finished is kept
            return 1
        print(f"{name}: {results[name]['report']}", file=sys.stderr)
        if args.study == "curves":
            problems += missed(name, results[name])
    for problem in problems:
        print(f"MISSED {problem}", file=sys.stderr)
    if args.json:
        print(json.dumps({"results": results, "missed": problems}))
    return 1 if args.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())
