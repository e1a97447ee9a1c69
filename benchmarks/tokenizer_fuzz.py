"""Random captions of every kind: our ids against those of open_clip's SimpleTokenizer.

    python benchmarks/tokenizer_fuzz.py --captions 1000000 --check

Caption n of a seed is always the same, so a difference can be looked at alone. Captions longer than 8192 characters are
compared up to there, where our tokenizer stops reading.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from declip.data.sources.base import LONGEST_CAPTION
from declip.data.tokenizer import Tokenizer

# Lists of strings would take a line for each.
WORDS = """
    a the of dog cat Running beach photo it's they've I'll 3rd 1,234.56 under_score snake-case HELLO don't ?!
    """.split()  # noqa: SIM905
EMOJI = [
    "😄",
    "👩\u200d🚀",
    "👨\u200d👩\u200d👧\u200d👦",
    "🇨🇭",
    "👍🏽",
    "❤\ufe0f",
    "☺",
    "1\ufe0f\u20e3",
    "\u200d",
    "\ufe0f",
]
SPELLED = ["<start_of_text>", "<END_OF_TEXT>", "<\u017ftart_of_text>", "<end_of_text", "'\u017f", "'S", "\u2019s"]
ENTITIES = ["&amp;", "&lt;b&gt;", "&amp;amp;", "&eacute;", "&#233;", "&#x1F600;", "&#xD800;", "&nbsp;", "&amp", "&#0;"]
ACCENTED = """
    café naïve Zürich Łódź España œuvre Ærø garçon İstanbul ΣΊΣΥΦΟΣ Привет ﬁne ＷＩＤＥ №５ ½ ² Ⅷ “quoted” ‘x’ — …
    """.split()  # noqa: SIM905
OTHERS = "שלום مرحبا नमस्ते สวัสดี 안녕하세요 こんにちは ｶﾀｶﾅ 𝒳𝓎 ᲀ Ꭰ ǆ".split()  # noqa: SIM905


def _range(rng: random.Random, first: int, last: int, most: int) -> str:
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, most)))


def _mojibake(rng: random.Random) -> str:
    text = rng.choice(ACCENTED + OTHERS + EMOJI)
    encoding = rng.choice(["latin-1", "cp1252", "cp1251", "mac_roman", "cp437"])
    return text.encode("utf-8").decode(encoding, "replace")


PIECES: list[Callable[[random.Random], str]] = [
    lambda rng: rng.choice(EMOJI),
    lambda rng: rng.choice(SPELLED),
    lambda rng: rng.choice(ENTITIES),
    lambda rng: rng.choice(ACCENTED),
    lambda rng: rng.choice(OTHERS),
    _mojibake,
    lambda rng: _range(rng, 0x20, 0x7E, 12),
    lambda rng: _range(rng, 0, 0xA0, 4),  # control characters, NUL among them
    lambda rng: _range(rng, 0xA0, 0x24F, 6),
    lambda rng: _range(rng, 0x4E00, 0x9FFF, 12),
    lambda rng: _range(rng, 0x600, 0x6FF, 8),
    lambda rng: rng.choice("aeou") + _range(rng, 0x300, 0x36F, 3),  # combining marks
    lambda rng: _range(rng, 0x2000, 0x2BFF, 3),  # white space of all widths, punctuation, signs
    lambda rng: _range(rng, 0xD800, 0xDFFF, 2),  # surrogates, alone or in pairs
    lambda rng: _range(rng, 0xF900, 0xFFFF, 3),
    lambda rng: _range(rng, 0x1F000, 0x1FAFF, 3),
    lambda rng: _range(rng, 0, 0x10FFFF, 3),
]


def caption(seed: int, number: int) -> str:
    """Caption `number`: words, mixed with pieces of one kind, of many or of none."""
    rng = random.Random(f"{seed} {number}")
    if number % 20_000 == 7:
        return rng.choice(["a", "ab", "猫", "😄", "é", "x'"]) * 10_000
    kinds = rng.sample(PIECES, rng.choice([0, 1, 1, 2, len(PIECES)]))
    parts = [
        rng.choice(kinds)(rng) if kinds and rng.random() < 0.4 else rng.choice(WORDS) for _ in range(rng.randint(0, 12))
    ]
    return "".join(part + rng.choice(["", " ", " ", " ", "  ", "\t", "\n"]) for part in parts)


def differences(seed: int, numbers: range) -> list[dict[str, Any]]:
    """The captions whose ids are not open_clip's."""
    from open_clip.tokenizer import SimpleTokenizer

    ours, theirs, found = Tokenizer(), SimpleTokenizer(), []
    for number in numbers:
        text = caption(seed, number)
        if ours.encode(text) != theirs.encode(text[:LONGEST_CAPTION]):
            found.append({"number": number, "caption": ascii(text)})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="exit with 1 where there is a difference")
    options = parser.parse_args()
    chunks = [range(at, min(at + 5000, options.captions)) for at in range(0, options.captions, 5000)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        found = [one for part in pool.imap(partial(differences, options.seed), chunks) for one in part]
    result = {"captions": options.captions, "seed": options.seed, "differences": len(found), "first": found[:10]}
    print(json.dumps(result, indent=2))
    return int(options.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
