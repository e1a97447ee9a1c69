"""Loading a pair on one core, side by side: open_clip's own pipeline, and the way of DeCLIP's public code.

    python benchmarks/loader.py [--textaugment FOLDER] [--json] [--check]

clip: from tar shards of JPEGs of 640 x 480 to batches of one view of 224 pixels and its tokens. The peer is open_clip's
training loader (webdataset, PIL, its transform and tokenizer), unmodified, with its own shuffle buffers.
declip: two strong views and three text views (the caption, masked, augmented). The peer is what the public code does:
PIL and torchvision, then easy data augmentation, tokens of 77 and masking, caption by caption, in the training process.
The peer's augmentation is textaugment's where that is installed (see peer_text.py), else none, which favours the peer.
tokens, words: as in peer_text.py.

Each way takes turns over all pairs, in one process and with one thread; processor time, so that other programs do not
count; medians. Pictures are noise of every scale, as hard to decode as photographs; --data takes those of a source.
Captions are of words as frequent as words are, many of them rare; --captions takes those of a source.
Needs what open_clip's training asks for: torchvision, pandas, braceexpand, webdataset <= 0.2.86.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_views
import numpy as np
import peer_text
import torch

from declip.data.decoded import Images
from declip.data.loader import BatchMaker, make_loader
from declip.data.sources import open_sources
from declip.data.words import load_synonyms
from declip.pairs import Data
from declip.recipe import load_recipe

BATCH, SIZE, CONTEXT = 64, 224, 77
TARGETS = {"clip": 2.0, "declip": 2.5, "tokens": 10.0, "words": 10.0}
PUBLISHED_CROP = ["data.images.crop_scale=[0.9,1.0]"]  # open_clip's, so that both ways see the same
THREE_TEXTS = 'terms.contrastive.texts=["caption","masked","augmented"]'


def captions(count: int) -> list[str]:
    """Sentences of eight to fourteen words, which come as often as words do: the n-th most frequent one 1/n times."""
    rng = np.random.default_rng(0)
    common = ["a", "the", "of", "in", "on", "and", "with", "is", "are", "to", "two", "at", "while", "his", "her", "man"]
    words = common + rng.permutation([word for word in load_synonyms() if word.isalpha()]).tolist()
    shares = 1 / (np.arange(len(words)) + 2.7)
    drawn = iter(rng.choice(len(words), 15 * count, p=shares / shares.sum()).tolist())
    return [" ".join(words[next(drawn)] for _ in range(length)) for length in rng.integers(8, 15, count)]


def source_captions(data: str) -> list[str]:
    source = open_sources([data], Data())
    return [text for index in range(len(source)) for text in source.captions(index)][:20_000]


def write_shards(folder: Path, images: list[bytes], texts: list[str], per_shard: int = 128) -> None:
    for first in range(0, len(texts), per_shard):
        with tarfile.open(folder / f"{first // per_shard:03d}.tar", "w") as tar:
            for number in range(first, min(first + per_shard, len(texts))):
                for suffix, data in ((".jpg", images[number % len(images)]), (".txt", texts[number].encode())):
                    member = tarfile.TarInfo(f"{number:06d}{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def ours(folder: Path, name: str, options: list[str]) -> Callable[[], int]:
    """An epoch of our loader, in this process; returns how many pairs it made."""
    recipe = load_recipe(name, [f"data.train={str(folder)!r}", f"schedule.batch_size={BATCH}", *options])
    source = open_sources(recipe.data.train, recipe.data)
    maker = BatchMaker(Images(source, None), recipe, SIZE, CONTEXT)
    steps, epochs = len(source) // BATCH, iter(range(1000))

    def run() -> int:
        first = next(epochs) * steps
        return sum(batch.images.shape[1] for batch in make_loader(maker, first, first + steps, 0))

    return run


def open_clip_loader(folder: Path, pairs: int) -> Callable[[], int]:
    import open_clip
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    shards = sorted(folder.glob("*.tar"))
    options = Namespace(
        train_data=f"{folder}/{{{shards[0].stem}..{shards[-1].stem}}}.tar",
        train_num_samples=pairs,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        workers=0,
        world_size=1,
        batch_size=BATCH,
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    data = get_wds_dataset(options, image_transform(SIZE, is_train=True), True, tokenizer=tokenizer)
    return lambda: sum(len(images) for images, _ in data.dataloader)


def public_code(folder: Path, textaugment: Path | None) -> Callable[[], int]:
    """Two views in the data set, texts in the training process, as DeCLIP's public code has them."""
    from open_clip.tokenizer import SimpleTokenizer
    from torch.utils.data import DataLoader

    source = open_sources([str(folder)], load_recipe("declip").data)
    views, tokenizer = image_views.ways()["two strong, torchvision"], SimpleTokenizer()
    peer = peer_text.peer_words(textaugment) if textaugment else None
    changes = list(peer.values()) if peer else [lambda text: text]

    class Pairs(torch.utils.data.Dataset[tuple[Any, ...]]):
        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int) -> tuple[Any, ...]:
            pair = source[index]
            return *views(pair.image), pair.captions[0]

    def masked(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """BERT's rule, token by token."""
        ids, labels = tokens.tolist(), [-100] * len(tokens)
        for place, token in enumerate(ids):
            if token in (0, 49406, 49407) or random.random() >= 0.15:
                continue
            labels[place], draw = token, random.random()
            ids[place] = 49408 if draw < 0.8 else random.randrange(49408) if draw < 0.9 else token
        return torch.tensor(ids), torch.tensor(labels)

    def run() -> int:
        made = 0
        for first, second, texts in DataLoader(Pairs(), BATCH, shuffle=True, drop_last=True):
            augmented = [random.choice(changes)(text) for text in texts]
            tokens = tokenizer(list(texts))
            tokenizer([text if isinstance(text, str) else " ".join(text) for text in augmented])
            torch.stack([masked(row)[0] for row in tokens])
            made += len(first) * (len(second) == len(tokens))
        return made

    return run


def measure(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Milliseconds a pair."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            start = time.process_time()
            pairs = run()
            if number:  # the first round fills caches
                taken[name].append(1000 * (time.process_time() - start) / pairs)
    return {name: statistics.median(figures) for name, figures in taken.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a source of pairs, whose images are taken")
    parser.add_argument("--captions", help="a source of pairs, whose captions are taken")
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--textaugment", type=Path, help="folder that textaugment is installed in")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    texts = source_captions(args.captions) if args.captions else captions(20_000)
    texts_beside = peer_text.measure(texts, args.textaugment, 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, image_views.load_images(args.data, 128), texts[: args.pairs])
        ways = {
            "clip, open_clip": open_clip_loader(folder, args.pairs),
            "clip": ours(folder, "clip-vit-b32", PUBLISHED_CROP),
            "clip, crops from half of the area": ours(folder, "clip-vit-b32", ["data.images.crop_scale=[0.5,1.0]"]),
            "declip, public code": public_code(folder, args.textaugment),
            "declip": ours(folder, "declip-vit-b32", ["method=paper", THREE_TEXTS]),
            "declip, augmented on the device": ours(
                folder, "declip-vit-b32", ["method=paper", THREE_TEXTS, "data.augment_on=device"]
            ),
        }
        taken = measure(ways, args.rounds)
    faster = {
        "clip": taken["clip, open_clip"] / taken["clip"],
        "declip": taken["declip, public code"] / taken["declip"],
        "tokens": texts_beside["tokens"]["encode"]["times"],
        **({"words": texts_beside["words"]["times"]} if "words" in texts_beside else {}),
    }
    if args.json:
        print(json.dumps({"milliseconds_a_pair": taken, "times_as_fast": faster, "texts": texts_beside}))
    else:
        _print(taken, faster)
    missed = [name for name, target in TARGETS.items() if faster.get(name, target) < target]
    print(f"missed: {', '.join(missed) or 'none'}", file=sys.stderr)
    return int(args.check and bool(missed))


def _print(taken: dict[str, float], faster: dict[str, float]) -> None:
    for name, figure in taken.items():
        print(f"{name:36} {figure:7.2f} ms a pair, {1000 / figure:6.0f} pairs/s on a core")
    for name, factor in faster.items():
        print(f"{name:36} {factor:7.1f} times the peer")


if __name__ == "__main__":
    raise SystemExit(main())
