"""From the bytes of a JPEG file to image views, on one core, beside the ways of the field.

    python benchmarks/image_views.py                 a table
    python benchmarks/image_views.py --check --json  the same as JSON; exit code 1 where a target is missed

weak: CLIP's one view of 224 pixels. The peer is open_clip's own training transform (a crop of 0.9 to 1 of the area,
bicubic, to floats, normalised); ours is timed with that crop and with its default of 0.5 to 1, and stays bytes, which
are normalised on the device. strong: DeCLIP's two views; the peer is MOCOV2 as its published code has it, with Pillow
and torchvision. The images are random photo-like fields, or those of --data, as JPEGs of 640 x 480 and quality 90. All
ways take turns over all images; medians of the rounds, in processor time. Needs torchvision.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from open_clip.transform import image_transform
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table
from torchvision import transforms

from declip.data.decode import decode_image
from declip.data.images import STRONG, WEAK, make_views
from declip.data.sources import open_sources
from declip.pairs import Data

WIDTH, HEIGHT, QUALITY, SIZE = 640, 480, 90, 224
WEAK_FASTER = 2.0  # at least: images a second over open_clip's
STRONG_FASTER = 2.5  # at least: over torchvision's

console = Console(stderr=True)


def encode(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def photo_like(seed: int) -> bytes:
    """Noise of every scale, the coarser the stronger, mostly grey: as hard to decode as a photograph."""
    rng = np.random.default_rng(seed)
    pixels = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
    for octave in range(8):
        shape = (HEIGHT >> octave, WIDTH >> octave)
        grey = rng.standard_normal(shape, np.float32)
        for channel in range(3):
            noise = (grey + 0.35 * rng.standard_normal(shape, np.float32)) * 5 * 2 ** (0.75 * octave)
            plane = Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(plane)
    return encode(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))


def load_images(data: str | None, count: int) -> list[bytes]:
    if data is None:
        return [photo_like(seed) for seed in range(count)]
    source = open_sources([data], Data())
    images = [decode_image(source[index].image) for index in range(min(count, len(source)))]
    return [encode(Image.fromarray(image).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) for image in images]


def blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*STRONG.blur_sigma)))


def ways() -> dict[str, Callable[[bytes], Any]]:
    """Everything that is timed, from an encoded image to all of its views."""
    open_clip = image_transform(SIZE, is_train=True)
    mocov2 = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, STRONG.crop_scale),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], STRONG.jitter),
            transforms.RandomGrayscale(STRONG.grayscale),
            transforms.RandomApply([blur], STRONG.blur),
            transforms.RandomHorizontalFlip(STRONG.flip),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    rng = np.random.default_rng(0)
    as_open_clip = WEAK.model_copy(update={"crop_scale": (0.9, 1.0)})

    def with_torchvision(data: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [mocov2(image), mocov2(image)]

    return {
        "weak, open_clip": lambda data: open_clip(Image.open(io.BytesIO(data))),
        "weak, declip, its crop": lambda data: make_views(data, SIZE, [as_open_clip], rng),
        "weak, declip": lambda data: make_views(data, SIZE, [WEAK], rng),
        "two strong, torchvision": with_torchvision,
        "two strong, declip": lambda data: make_views(data, SIZE, [STRONG, STRONG], rng),
        "decoding, Pillow": lambda data: Image.open(io.BytesIO(data)).convert("RGB"),
        "decoding, declip": decode_image,
    }


def measure(images: list[bytes], rounds: int) -> dict[str, float]:
    """Milliseconds an image of each way, of processor time: other programs on the core do not count."""
    timed = ways()
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 1):
        for name, way in timed.items():
            start = time.process_time()
            for image in images:
                way(image)
            if number:  # the first round fills caches
                seconds[name].append((time.process_time() - start) / len(images))
    return {name: 1000 * statistics.median(taken) for name, taken in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a source of pairs, whose images are taken")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = load_images(args.data, args.images)
    taken = measure(images, args.rounds)
    weak, strong = taken["weak, open_clip"], taken["two strong, torchvision"]
    faster = {
        "weak, declip, its crop": weak / taken["weak, declip, its crop"],
        "weak, declip": weak / taken["weak, declip"],
        "two strong, declip": strong / taken["two strong, declip"],
        "decoding, declip": taken["decoding, Pillow"] / taken["decoding, declip"],
    }
    if args.json:
        size = statistics.mean(map(len, images))
        print(json.dumps({"mean_bytes": size, "milliseconds": taken, "times_as_fast": faster}))
    table = Table("", "ms an image", "images/s per core", "times as fast")
    for name, figure in taken.items():
        table.add_row(name, f"{figure:.2f}", f"{1000 / figure:.0f}", f"{faster[name]:.2f}" if name in faster else "")
    console.print(table)
    wanted = {"weak, declip, its crop": WEAK_FASTER, "weak, declip": WEAK_FASTER, "two strong, declip": STRONG_FASTER}
    missed = [name for name, factor in wanted.items() if faster[name] < factor]
    print(f"missed: {', '.join(missed) or 'none'}", file=sys.stderr)
    return int(args.check and bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
