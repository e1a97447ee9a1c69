"""Captions a second on one core: tokens against open_clip's SimpleTokenizer, changed words against textaugment.

    python benchmarks/peer_text.py ../shared/data/flickr8k_train.parquet --json

Tokens are timed from a fresh tokenizer on, over captions that it has not seen. Words are changed by one operation each,
drawn evenly: a synonym, a swap, or deletion with p = 0.1.

textaugment comes without what it asks for, as only its eda.py is used, from a folder outside the environment:
`pip install --no-deps --target FOLDER textaugment`, then `--textaugment FOLDER`. It needs NLTK and, where NLTK_DATA
points to, corpora/wordnet (of Debian's wordnet-base and wordnet-sense-index, with a lexnames file) and
corpora/stopwords/english.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from declip.data.sources import open_sources
from declip.data.tokenizer import Tokenizer
from declip.data.words import augment, load_synonyms
from declip.pairs import CaptionViews, Data

ODD = [
    "grinning face with smiling eyes 😄 number {}",
    "👩\u200d🚀 woman astronaut: medium skin tone 🇨🇭 {}",
    "一只猫坐在桌子上看着窗外的鸟 {}",
    "Café «Zürich» — naïve œuvre {}",
    "Tom &amp; Jerry &lt;b&gt; no. {}",
]
"""Captions that need more than a look-up: emoji, Chinese, accents, HTML entities."""


def seconds(prepare: Callable[[], Callable[[str], object]], captions: Sequence[str], repeats: int) -> float:
    """Best processor time of one pass over the captions with what `prepare` makes anew, which is not counted."""
    best = float("inf")
    for _ in range(repeats):
        function = prepare()
        start = time.process_time()
        for caption in captions:
            function(caption)
        best = min(best, time.process_time() - start)
    return best


OPERATIONS = ("synonym", "swap", "deletion")


def our_words(operations: Sequence[str]) -> Callable[[str], str]:
    frequencies = {name: float(name in operations) for name in OPERATIONS}
    views, rng, synonyms = CaptionViews.model_validate(frequencies), np.random.default_rng(0), load_synonyms()
    return lambda text: augment(text, synonyms, views, rng)


def peer_words(folder: Path) -> dict[str, Callable[[str], str]] | None:
    """textaugment's EDA, unmodified, or None where it is not in that folder."""
    file = folder / "textaugment" / "eda.py"
    if not file.exists():
        return None
    spec = importlib.util.spec_from_file_location("textaugment_eda", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stderr(io.StringIO()):  # it tries to download what is there already
        eda = module.EDA()
    eda.synonym_replacement("a dog")  # reads WordNet
    operations = [eda.synonym_replacement, eda.random_swap, lambda text: eda.random_deletion(text, p=0.1)]
    return dict(zip(OPERATIONS, operations, strict=True))


def side_by_side(ours: float, theirs: float, captions: int) -> dict[str, float]:
    return {
        "captions": captions,
        "ours_us": round(ours / captions * 1e6, 2),
        "theirs_us": round(theirs / captions * 1e6, 2),
        "ours_per_second": round(captions / ours),
        "theirs_per_second": round(captions / theirs),
        "times": round(theirs / ours, 1),
    }


def measure(captions: Sequence[str], folder: Path | None, repeats: int) -> dict[str, Any]:
    from open_clip.tokenizer import SimpleTokenizer

    results: dict[str, Any] = {}
    odd = [text.format(number) for number in range(1000) for text in ODD]
    for name, texts in {"tokens": captions, "tokens_odd": odd}.items():
        encoded, called = Tokenizer().encode, SimpleTokenizer()
        if any(encoded(text) != called.encode(text) for text in texts):
            raise RuntimeError(f"{name}: our ids are not open_clip's")
        ours = seconds(lambda: Tokenizer().encode, texts, repeats)
        results[name] = {
            "encode": side_by_side(ours, seconds(lambda: SimpleTokenizer().encode, texts, repeats), len(texts)),
            "call": side_by_side(ours, seconds(SimpleTokenizer, texts, repeats), len(texts)),
        }
    peer = peer_words(folder) if folder else None
    if peer is None:
        print("words: skipped, no textaugment (see --help)", file=sys.stderr)
        return results
    random.seed(0)
    theirs = list(peer.values())
    mixed = seconds(lambda: lambda text: random.choice(theirs)(text), captions, repeats)
    results["words"] = side_by_side(seconds(lambda: our_words(OPERATIONS), captions, repeats), mixed, len(captions))
    for name, function in peer.items():
        results[f"words_{name}"] = side_by_side(
            seconds(partial(our_words, [name]), captions, repeats),
            seconds(lambda function=function: function, captions, repeats),  # type: ignore[misc]
            len(captions),
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="pairs whose captions are used")
    parser.add_argument("--captions", type=int, default=30_000)
    parser.add_argument("--textaugment", type=Path, help="folder that textaugment is installed in")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    source = open_sources([options.data], Data())
    captions = [text for index in range(len(source)) for text in source.captions(index)][: options.captions]
    results = measure(captions, options.textaugment, options.repeats)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    rows = {name: row for name, row in results.items() if name.startswith("words")}
    rows |= {f"{name} ({way})": results[name][way] for name in ("tokens", "tokens_odd") for way in ("encode", "call")}
    for name, row in rows.items():
        print(f"{name:20} {row['ours_us']:8.2f} us ours {row['theirs_us']:8.2f} us theirs {row['times']:6.1f} times")


if __name__ == "__main__":
    main()
