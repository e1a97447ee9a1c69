"""CLIP's byte-pair encoding, with the ids of open_clip's own tokenizer at a multiple of its speed."""

from __future__ import annotations

import functools
import gzip
import html
import importlib.util
import unicodedata
from pathlib import Path
from typing import NamedTuple, Protocol

import ftfy
import regex
from ftfy.badness import is_bad
from tokenizers import models

from declip.data.sources.base import LONGEST_CAPTION

PAD = 0
SOT = 49406
EOT = 49407
MASK_ID = 49408  # one past open_clip's vocabulary


class SpecialTokens(NamedTuple):
    """The ids around and besides the words of a caption.

    start, end: what stands before and after a caption's own ids
    vocabulary: random ids of the masked view are drawn below this
    never: ids that are never hidden
    """

    start: tuple[int, ...] = (SOT,)
    end: tuple[int, ...] = (EOT,)
    pad: int = PAD
    mask: int = MASK_ID
    vocabulary: int = SOT
    never: frozenset[int] = frozenset({SOT, EOT, MASK_ID})


CLIP_TOKENS = SpecialTokens()


class CaptionTokenizer(Protocol):
    """Captions to ids, and the ids around them."""

    @property
    def special(self) -> SpecialTokens: ...

    def encode(self, text: str) -> list[int]: ...


class Tokenizer:
    """open_clip's byte-pair encoding (OpenAI's), fast and with bounded memory over any number of captions.

    Can be pickled, so that a loader may hand it to its workers.
    """

    special = CLIP_TOKENS

    def __init__(self, cache_size: int = 2**16) -> None:
        """`cache_size`: of how many words, and of how many captions beyond plain ASCII, the ids are kept."""
        self.cache_size = cache_size
        self._pairs, self._whole = _byte_pairs(), _whole_words()
        self._word = functools.lru_cache(cache_size)(self._encode_word)
        self._caption = functools.lru_cache(cache_size)(self._encode_any)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[int]]:
        return Tokenizer, (self.cache_size,)

    def encode(self, text: str) -> list[int]:
        """The ids of a caption, without start and end token: exactly open_clip's.

        Only the first 8192 characters are read, as many as sources hand on.
        """
        if text.isascii() and text.isprintable() and "&" not in text:
            return self._encode_clean(text[:LONGEST_CAPTION])  # nothing to clean: most captions
        if len(text) <= LONGEST_KEPT_CAPTION:
            return list(self._caption(text))
        return self._encode_clean(clean(text[:LONGEST_CAPTION]))

    def _encode_any(self, text: str) -> tuple[int, ...]:
        return tuple(self._encode_clean(clean(text)))

    def _encode_clean(self, text: str) -> list[int]:
        # No token spans white space, so words can be looked up one by one. Lower case depends on what stands around a
        # letter (the Greek sigma), so it comes first.
        ids: list[int] = []
        whole, known = self._whole, self._word
        for word in text.lower().split():
            if (token := whole.get(word)) is not None:
                ids.append(token)
            else:
                ids += known(word) if len(word) <= _LONGEST_KEPT_WORD else self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word.isascii() and word.isalpha():  # one part, and its letters stand for themselves
            return tuple([token.id for token in self._pairs.tokenize(word)])
        ids: list[int] = []
        # Python's regex and Rust's differ in what a letter is, so words are split here and merged there.
        for part in _PARTS.findall(word):
            special = _SPELLED.get(part)
            if special is None:
                symbols = part.encode().decode("latin-1").translate(_BYTE_SYMBOLS)
                ids += [token.id for token in self._pairs.tokenize(symbols)]
            else:
                ids.append(special)
        return tuple(ids)


# What is kept of one caption or one word is bounded too: longer ones hardly ever come twice.
LONGEST_KEPT_CAPTION = 256
_LONGEST_KEPT_WORD = 64

_END = "</w>"  # of a word
_SPELLED = {"<start_of_text>": SOT, "<end_of_text>": EOT}

# open_clip's pattern, letter by letter.
_PARTS = regex.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)

# Characters that some step of ftfy replaces wherever they stand; the tests go through all of Unicode. Control and
# escape characters, line breaks, joined Latin letters, curly quotes, full and half widths, surrogates.
_REPLACED = regex.compile(
    "[\0-\x08\n\x0b\f\r\x0e-\x1f\x7f-\x9f\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\u02bc\u2018-\u201f\u2028\u2029"
    "\u206a-\u206f\u3000\ud800-\udfff\ufb00-\ufb06\ufeff\uff01-\uffef\ufff9-\ufffc]"
)


def clean(text: str) -> str:
    """open_clip's cleaning but for white space and lower case: ftfy, then HTML entities, which may be escaped twice."""
    # ftfy takes most of the time. It only replaces the characters above, entities, what it holds for text in a wrong
    # encoding (its own `is_bad` says so) and what is not in normal form C.
    if "&" in text or _REPLACED.search(text) or is_bad(text) or not unicodedata.is_normalized("NFC", text):
        return html.unescape(html.unescape(ftfy.fix_text(text)))
    return text


def _byte_symbols() -> dict[int, int]:
    """The printable character that stands for each byte in the vocabulary, as OpenAI's bytes_to_unicode gives them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {byte: 256 + number for number, byte in enumerate(rest)}


_BYTE_SYMBOLS = _byte_symbols()


@functools.cache
def _byte_pairs() -> models.BPE:
    entries = [*_symbols(), *(symbol + _END for symbol in _symbols()), *map("".join, _merges())]
    return models.BPE({entry: number for number, entry in enumerate(entries)}, _merges(), end_of_word_suffix=_END)


@functools.cache
def _whole_words() -> dict[str, int]:
    """The words of ASCII letters that are one token. Merging leads to it for each of them, as a test makes sure."""
    words = {"".join(merge): number for number, merge in enumerate(_merges(), 2 * len(_symbols()))}
    bodies = ((entry.removesuffix(_END), number) for entry, number in words.items() if entry.endswith(_END))
    return {word: number for word, number in bodies if word.isascii() and word.isalpha()}


def _symbols() -> list[str]:
    return [chr(symbol) for symbol in _BYTE_SYMBOLS.values()]


@functools.cache
def _merges() -> list[tuple[str, str]]:
    """The vocabulary file of open_clip; importing all of open_clip to find it would take seconds."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
    file = Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : SOT - 512 + 1]
    return [(first, second) for first, second in (line.split() for line in lines)]
