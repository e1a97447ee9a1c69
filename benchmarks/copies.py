"""How many copies of pictures `declip data inspect` and `dedup` find, how many other pictures they take for copies.

    python benchmarks/copies.py ../shared/data/flickr8k_train.parquet [--images 2000] [--hashes 1000000] [--json]

Of each picture one copy of each kind is made. Found is a copy whose original is named with it. False are pairs of
pictures of the set itself that are named, which a person should look at: they may be copies. The search is timed over
so many random fingerprints, of which one in ten has a copy a few bits off.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from declip.curation.duplicates import DISTANCE, near_duplicates
from declip.curation.fingerprints import THUMBNAIL, fingerprint
from declip.data.sources import open_sources
from declip.pairs import Data


def cropped(image: Image.Image, *shares: float) -> Image.Image:
    """Without these shares of the width and height: left, top, right, bottom."""
    left, top, right, bottom = shares
    width, height = image.size
    edges = left * width, top * height, (1 - right) * width, (1 - bottom) * height
    return image.crop(tuple(map(round, edges)))


KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "recompressed, quality 50": lambda image: image,
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "one and a half times the size": lambda image: image.resize((image.width * 3 // 2, image.height * 3 // 2)),
    "brightness + 15 %": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "contrast - 15 %": lambda image: ImageEnhance.Contrast(image).enhance(0.85),
    "1 % off each side": lambda image: cropped(image, 0.01, 0.01, 0.01, 0.01),
    "3 % off one side": lambda image: cropped(image, 0.03, 0, 0, 0),
    "5 % off each side": lambda image: cropped(image, 0.05, 0.05, 0.05, 0.05),
}


def copy(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    KINDS[kind](image).save(buffer, "JPEG", quality=50 if "quality" in kind else 90)
    return buffer.getvalue()


def measure_recall(data: str, count: int) -> dict[str, Any]:
    source = open_sources([data], Data(), need_captions=False)
    images = [source[int(i)].image for i in np.linspace(0, len(source) - 1, min(count, len(source)))]
    originals = [fingerprint(image) for image in images]
    results: dict[str, Any] = {"images": len(images), "found_percent": {}}
    for kind in KINDS:
        copies = [fingerprint(copy(Image.open(io.BytesIO(image)).convert("RGB"), kind)) for image in images]
        both = [*originals, *copies]
        hashes = np.array([one.perceptual_hash for one in both], np.uint64)
        found = near_duplicates(hashes, np.stack([one.thumbnail for one in both]))
        named = int((found[:, 1] - found[:, 0] == len(images)).sum())
        results["found_percent"][kind] = round(100 * named / len(images), 1)
    within = near_duplicates(hashes[: len(images)], np.stack([one.thumbnail for one in originals]))
    results["pairs_of_the_set_named"] = len(within)
    return results


def measure_search(count: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    thumbnails = rng.integers(0, 256, (count, THUMBNAIL), np.uint8)
    copies = count // 10
    hashes[:copies] = hashes[-copies:]
    for _ in range(DISTANCE // 2):  # bits that are turned
        hashes[:copies] ^= np.uint64(1) << rng.integers(0, 64, copies).astype(np.uint64)
    thumbnails[:copies] = thumbnails[-copies:]
    start = time.perf_counter()
    found = near_duplicates(hashes, thumbnails)
    return {
        "fingerprints": count,
        "seconds": round(time.perf_counter() - start, 1),
        "found_percent": round(100 * len(found) / copies, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="pictures that are no copies of one another")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--hashes", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = {"copies": measure_recall(options.data, options.images), "search": measure_search(options.hashes)}
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for kind, percent in results["copies"]["found_percent"].items():
        print(f"{kind:32} {percent:5.1f} % found")
    own = results["copies"]
    print(f"pairs of the set's own {own['images']:,} pictures named: {own['pairs_of_the_set_named']}")
    search = results["search"]
    print(f"{search['fingerprints']:,} fingerprints: {search['seconds']} s, {search['found_percent']} % found")


if __name__ == "__main__":
    main()
