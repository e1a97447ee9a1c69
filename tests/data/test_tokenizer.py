"""Ids against open_clip's own tokenizer."""

from __future__ import annotations

import importlib.util
import pickle
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import ModuleType

import ftfy
import numpy as np
import open_clip
import pytest
from ftfy.badness import is_bad
from hypothesis import given
from hypothesis import strategies as st

from declip.data import tokenizer as module
from declip.data.captions import tokenize
from declip.data.tokenizer import Tokenizer

TEXTS = [
    "a photo of a dog",
    "A Photo of a DOG, running!!  (on the   beach)",
    "  leading and trailing  ",
    "it's the dog's 3rd ball; they've 1,234.56 more & don't care",
    "grinning face with smiling eyes 😄",
    "👩‍🚀 woman astronaut: medium skin tone 🇨🇭",
    "一只猫坐在桌子上",
    "caf\u00e9 na\u00efve \u201cquotes\u201d \u2014 dashes\u2026",
    "Tom &amp; Jerry &lt;b&gt; &amp;amp; &eacute;",
    "<b>bold</b> &lt;i&gt;",
    "schÃ¶n mojibake â€œquotedâ€\x9d",
    "tabs\tand\nnew\r\nlines\x00\x1b[31m",
    "<start_of_text> inside <END_OF_TEXT>",
    "snake_case and/or under_score's --- ... ?!?!",
    "",
    "   ",
    "word " * 200,
    "supercalifragilisticexpialidocious " * 30,
    "ﬁne ligature ｆｕｌｌ ｗｉｄｔｈ",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def open_clip_ids(texts: list[str], context_length: int = 77) -> np.ndarray:
    """open_clip's tokens, cut to the longest."""
    tokens = open_clip.get_tokenizer("ViT-B-32", context_length=context_length)(texts).numpy()
    return tokens[:, : int((tokens != 0).sum(axis=1).max())]


@pytest.mark.parametrize("context_length", [77, 16, 2])
def test_tokens_are_open_clips(tokenizer: Tokenizer, context_length: int) -> None:
    tokens = tokenize([tokenizer.encode(text) for text in TEXTS], context_length)
    assert tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens, open_clip_ids(TEXTS, context_length))


def test_random_plain_text_is_open_clips(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    printable = np.array([chr(code) for code in range(32, 127)] + [" "] * 20 + ["'s", "'ve", "dog", "<start_of_text>"])
    simple = open_clip.tokenizer.SimpleTokenizer()
    for _ in range(1000):
        text = "".join(rng.choice(printable, rng.integers(1, 30)))
        assert tokenizer.encode(text) == simple.encode(text), text


def test_tokenizer_can_be_sent_to_a_worker(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(Tokenizer(7)))
    assert copy.cache_size == 7
    assert copy.encode("a cat 😄") == tokenizer.encode("a cat 😄")


def test_tokenizer_does_without_the_rest_of_open_clip() -> None:
    code = """
import sys
from declip.data.tokenizer import Tokenizer
assert "torch" not in sys.modules
print(Tokenizer().encode("a cat"), "open_clip" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[320, 2368] False", done.stderr


@pytest.fixture(scope="module")
def simple() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer()


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    """benchmarks/tokenizer_fuzz.py, which goes through a million captions."""
    path = Path(__file__).parents[2] / "benchmarks" / "tokenizer_fuzz.py"
    spec = importlib.util.spec_from_file_location("tokenizer_fuzz", path)
    assert spec is not None
    assert spec.loader is not None
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    return fuzz


def test_captions_of_every_kind_are_open_clips(fuzz: ModuleType) -> None:
    assert fuzz.differences(1, range(3000)) == []
    texts = "".join(fuzz.caption(1, number) for number in range(3000))
    for piece in [
        "😄",
        "\u200d",
        "&amp;",
        "<start_of_text>",
        "\0",
        "Ã",
        "[\u0300-\u036f]",
        "[一-鿿]",
        "[\ud800-\udfff]",
    ]:
        assert re.search(piece, texts), ascii(piece)


def test_the_fuzz_sees_a_difference(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_bad", lambda text: False)
    assert fuzz.differences(1, range(3000))


@given(st.text(st.characters(), max_size=60))
def test_any_text_is_open_clips(tokenizer: Tokenizer, simple: open_clip.SimpleTokenizer, text: str) -> None:
    assert tokenizer.encode(text) == simple.encode(text)


def test_what_is_not_cleaned_needs_no_cleaning() -> None:
    """All of Unicode: a character that ftfy changes is one that the tokenizer hands to ftfy."""
    missed = []
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if module._REPLACED.search(character) or character == "&" or not unicodedata.is_normalized("NFC", character):
            continue
        missed.append(character)
    for at in range(0, len(missed), 64):  # what is not changed together is not changed alone
        for text in _without_mojibake("".join(missed[at : at + 64])):
            assert ftfy.fix_text(text) == text


def _without_mojibake(text: str) -> list[str]:
    """The text, or its characters apart where they look like a wrong encoding or compose when together."""
    if is_bad(text) or not unicodedata.is_normalized("NFC", text):
        return [character for character in text if not is_bad(character)]
    return [text]


def test_what_is_kept_is_bounded() -> None:
    small = Tokenizer(cache_size=10)
    for number in range(100):
        small.encode(f"number {number} 😄")
        small.encode(f"number {number}")
    assert small._caption.cache_info().currsize == 10
    assert small._word.cache_info().currsize == 10
    before = small._caption.cache_info().misses, small._word.cache_info().misses
    small.encode("猫" * 300)  # a long caption of one long word
    assert (small._caption.cache_info().misses, small._word.cache_info().misses) == before
    for text in ["a cat", "a cat 😄"]:
        first = small.encode(text)
        first.append(1)  # what the caller does with its list is its own business
        assert small.encode(text) == first[:-1]


@pytest.mark.parametrize("character", ["a", "猫", "a ", "& "])
def test_long_captions_are_read_up_to_8192_characters(
    tokenizer: Tokenizer, simple: open_clip.SimpleTokenizer, character: str
) -> None:
    text = character * (1_000_000 // len(character))
    assert tokenizer.encode(text) == simple.encode(text[:8192])


def test_eight_thousand_characters_are_open_clips(tokenizer: Tokenizer, simple: open_clip.SimpleTokenizer) -> None:
    text = ("the quick 😄 brown&amp;fox " * 400)[:8192]
    assert tokenizer.encode(text) == simple.encode(text)


def test_words_that_are_one_token_are_what_merging_leads_to() -> None:
    words = module._whole_words()
    assert len(words) > 30_000
    pairs = module._byte_pairs()
    assert [[token.id for token in pairs.tokenize(word)] for word in words] == [[number] for number in words.values()]
