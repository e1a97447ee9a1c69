"""Images a second of an evaluation, beside clip_benchmark's, with the same model on the same files.

    python benchmarks/embedding.py [--images 1024] [--model vit] [--json] [--check]

Photos of 500 × 375 pixels (pictures of --data, enlarged and encoded as JPEG) in class folders. clip_benchmark is run as
its command line runs it: its `run_classification` on a DataLoader with four workers and batches of 64, with and without
its mixed precision, which is its default. declip reads and embeds the same folder: `embed_source`, in float32 and in
bfloat16. Seconds by turns. Both classify with the same class vectors; accuracies and differing answers are printed.

vit: open_clip's ViT-B/32 as it is initialised; small: the towers of recipe `declip` (ResNet at 64 pixels), on --images
times eight, so that starting the loaders does not count for much.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
from clip_benchmark.metrics.zeroshot_classification import run_classification
from PIL import Image
from torch.nn.functional import normalize
from torchvision.datasets import ImageFolder

from declip.data.sources import open_sources
from declip.evaluation.embedding import embed_source
from declip.model.pretrained import LoadedModel
from declip.model.towers import build_from_config, model_config
from declip.pairs import Data
from declip.recipe import load_recipe

FASTER = 1.5  # at least: images a second over clip_benchmark's, at its default precision and ours of like kind
CLASSES = 10


def write_photos(folder: Path, data: str, count: int) -> None:
    source = open_sources([data], Data())
    for number in range(count):
        image = Image.open(io.BytesIO(source[number % len(source)].image)).convert("RGB")
        place = folder / f"{number % CLASSES}"
        place.mkdir(exist_ok=True)
        image.resize((500, 375), Image.Resampling.BICUBIC).save(place / f"{number:05d}.jpg", quality=90)


def build(name: str) -> LoadedModel:
    torch.manual_seed(0)
    if name == "vit":
        clip = open_clip.create_model("ViT-B-32").eval()
    else:
        clip = build_from_config(model_config(load_recipe("declip").model)).eval()
    return LoadedModel(name, clip, open_clip.image_transform(clip.visual.image_size, is_train=False), None)


def theirs(model: LoadedModel, folder: Path, classes: torch.Tensor, amp: bool) -> torch.Tensor:
    loader = torch.utils.data.DataLoader(
        ImageFolder(str(folder), transform=model.preprocess), batch_size=64, shuffle=False, num_workers=4
    )
    logits, _ = run_classification(model.clip, classes.T, loader, "cpu", amp=amp)
    return logits.argmax(1)


def ours(model: LoadedModel, folder: Path, classes: torch.Tensor) -> torch.Tensor:
    source = open_sources([str(folder)], Data())
    return (embed_source(model, source, "photos").images @ classes.T).argmax(1)


def measure(name: str, folder: Path, images: int, turns: int) -> dict[str, Any]:
    """Seconds of each way, by turns, and how far their answers agree."""
    model, in_half = build(name), build(name).embed_images_in_bfloat16()
    few = embed_source(model, open_sources([str(folder)], Data()), "photos").images[:: images // CLASSES][:CLASSES]
    classes = normalize(few - few.mean(0), dim=-1)  # around the mean, which all embeddings of a new model share
    ways = {
        "clip_benchmark_float32": lambda: theirs(model, folder, classes, False),
        "declip_float32": lambda: ours(model, folder, classes),
        "clip_benchmark_amp": lambda: theirs(model, folder, classes, True),
        "declip_bfloat16": lambda: ours(in_half, folder, classes),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    answers = {}
    for _ in range(turns):
        for way, run in ways.items():
            start = time.perf_counter()
            answers[way] = run()
            seconds[way].append(time.perf_counter() - start)
    rates = {way: images / min(times) for way, times in seconds.items()}
    exact = answers["clip_benchmark_float32"]
    return {
        "model": name,
        "images": images,
        "images_per_second": rates,
        "seconds": seconds,
        "ratio_float32": rates["declip_float32"] / rates["clip_benchmark_float32"],
        "ratio_default": rates["declip_bfloat16"] / rates["clip_benchmark_amp"],
        "answers_that_differ": {way: 100 * float((found != exact).float().mean()) for way, found in answers.items()},
        "median_seconds": {way: statistics.median(times) for way, times in seconds.items()},
    }


def missed(found: dict[str, Any]) -> list[str]:
    return [
        f"{found['model']}: {found[ratio]:.2f} times clip_benchmark's images a second ({ratio}), not {FASTER}"
        for ratio in ("ratio_float32", "ratio_default")
        if found[ratio] < FASTER
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024, help="photos (%(default)s)")
    parser.add_argument("--turns", type=int, default=2, help="times each way is run (%(default)s)")
    parser.add_argument("--model", choices=("vit", "small"), help="one of them; by default both")
    parser.add_argument("--data", default="demo:fluent3d", help="whose pictures the photos are made of (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        found = []
        for name, images in (("vit", args.images), ("small", 8 * args.images)):
            if args.model in (None, name):
                write_photos(Path(made), args.data, images)
                found.append(measure(name, Path(made), images, args.turns))
    behind = [sentence for each in found for sentence in missed(each)]
    if args.json:
        print(json.dumps({"models": found, "missed": behind}))
    else:
        for each in found:
            print(json.dumps(each, indent=1))
        print("\n".join(f"MISSED {what}" for what in behind) or "All targets met.")
    return 1 if args.check and behind else 0


if __name__ == "__main__":
    sys.exit(main())
