"""Captions to token ids, and the two text views that change a caption: masked tokens and augmented words.

Everything here is NumPy and plain Python: loader workers cut and mask captions without tensors.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from declip.errors import InputError
from declip.pairs import CaptionViews

Tokens = NDArray[np.int64]  # [captions, longest]

PAD = 0
SOT = 49406
EOT = 49407
MASK_ID = 49408  # one past open_clip's vocabulary
NO_LABEL = -100  # cross_entropy's default ignore_index


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

# Tokens ------------------------------------------------------------------------------------------------------------


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
        """`cache_size`: of how many captions, and of how many words, the ids are kept."""
        self.cache_size = cache_size
        self._simple = _shared_tokenizer()
        self._encodings = 0
        self._caption = functools.lru_cache(cache_size)(self._encode_caption)
        self._word = functools.lru_cache(cache_size)(self._encode)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[int]]:
        return Tokenizer, (self.cache_size,)

    def encode(self, text: str) -> list[int]:
        """The ids of a caption, without start and end token: exactly open_clip's."""
        return list(self._caption(text))

    def _encode_caption(self, text: str) -> tuple[int, ...]:
        # No token spans white space, and open_clip's cleaning (ftfy, HTML entities) leaves plain ASCII alone. So words
        # can be looked up one by one, which spares augmented captions, new every time, most of the work.
        if text.isascii() and text.isprintable() and "&" not in text:
            return tuple(token for word in text.split() for token in self._word(word))
        return self._encode(text)

    def _encode(self, text: str) -> tuple[int, ...]:
        self._encodings += 1
        if self._encodings % 2**18 == 0:
            # open_clip keeps every word it has ever seen; over millions of captions that would fill the memory.
            self._simple = _tokenizer_module().SimpleTokenizer()
        return tuple(self._simple.encode(text))


@functools.cache
def _shared_tokenizer() -> Any:
    return _tokenizer_module().SimpleTokenizer()


@functools.cache
def _tokenizer_module() -> ModuleType:
    """open_clip's tokenizer.py, loaded alone: importing all of open_clip takes seconds more."""
    if "open_clip.tokenizer" in sys.modules:
        return sys.modules["open_clip.tokenizer"]
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
    path = Path(package.origin).with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("declip._open_clip_tokenizer", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"open_clip has no tokenizer at {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tokenize(texts: Sequence[Sequence[int]], context_length: int, special: SpecialTokens = CLIP_TOKENS) -> Tokens:
    """Ids of captions to ``[captions, longest]``: start, ids, end, then padding up to the longest caption only.

    A caption too long for `context_length` is cut, its end token stays. Raises InputError when not even start and end
    fit in.
    """
    return _rows(_cut(texts, context_length, special), special.start, special.end, special.pad)


def tokenize_masked(
    texts: Sequence[Sequence[int]],
    context_length: int,
    share: float,
    rngs: np.random.Generator | Sequence[np.random.Generator],
    special: SpecialTokens = CLIP_TOKENS,
) -> tuple[Tokens, Tokens]:
    """As `tokenize`, with tokens hidden by `mask_tokens` after cutting: (tokens, labels), both ``[captions, longest]``.

    Labels are -100 at start, end and padding and wherever nothing is to be predicted. `rngs` is one generator for all
    captions or one for each.
    """
    if isinstance(rngs, np.random.Generator):
        rngs = [rngs] * len(texts)
    cut = _cut(texts, context_length, special)
    masked = [mask_tokens(ids, rng, share, special) for ids, rng in zip(cut, rngs, strict=True)]
    tokens = _rows([ids for ids, _ in masked], special.start, special.end, special.pad)
    start, end = ((NO_LABEL,) * len(ids) for ids in (special.start, special.end))
    return tokens, _rows([labels for _, labels in masked], start, end, NO_LABEL)


def _cut(texts: Sequence[Sequence[int]], context_length: int, special: SpecialTokens) -> list[Sequence[int]]:
    around = len(special.start) + len(special.end)
    if context_length < around:
        raise InputError(
            f"context_length = {context_length} is too short: a start and an end token need {around} positions."
        )
    return [ids[: context_length - around] for ids in texts]


def _rows(texts: Sequence[Sequence[int]], start: tuple[int, ...], end: tuple[int, ...], padding: int) -> Tokens:
    around = len(start) + len(end)
    longest = max((len(ids) for ids in texts), default=0) + around
    rows = np.full((len(texts), longest), padding, np.int64)
    for row, ids in zip(rows, texts, strict=True):
        row[: len(ids) + around] = [*start, *ids, *end]
    return rows


def mask_tokens(
    ids: Sequence[int], rng: np.random.Generator, share: float, special: SpecialTokens = CLIP_TOKENS
) -> tuple[list[int], list[int]]:
    """Hide a share of a caption's ids (without start and end token): (corrupted ids, labels).

    Each id is chosen with probability `share`; of the chosen, 80 % become the mask token, 10 % a random id, 10 % stay
    (BERT, Devlin et al. 2019, section 3.1). Labels hold the original id where one was chosen and -100 elsewhere.
    """
    corrupted, labels = list(ids), [NO_LABEL] * len(ids)
    for position, draw in enumerate(rng.random(len(ids)).tolist()):
        token = corrupted[position]
        if draw >= share or token in special.never:  # a caption may spell out "<end_of_text>"
            continue
        labels[position] = token
        if draw < 0.8 * share:
            corrupted[position] = special.mask
        elif draw < 0.9 * share:
            # Never a start, end or mask token. The reference draws those too; its random end token moves the pooling.
            drawn = int(rng.integers(special.vocabulary))
            corrupted[position] = token if drawn in special.never else drawn
    return corrupted, labels


# Words -------------------------------------------------------------------------------------------------------------

_PUNCTUATION = string.punctuation + "“”„‘’«»‹›…–—。、，！？；：（）"  # what is taken off a word before it is looked up

# The English list that is in common use (NLTK's, after Porter): words with no synonym worth having.
_STOPWORDS = frozenset(
    # A list of strings would take a line for each of the 179.
    """
    i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his
    himself she she's her hers herself it it's its itself they them their theirs themselves what which who whom this
    that that'll these those am is are was were be been being have has had having do does did doing a an the and but
    if or because as until while of at by for with about against between into through during before after above
    below to from up down in out on off over under again further then once here there when where why how all any
    both each few more most other some such no nor not only own same so than too very s t can will just don don't
    should should've now d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn
    hasn't haven haven't isn isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn
    wasn't weren weren't won won't wouldn wouldn't
    """.split()  # noqa: SIM905
)


class Synonyms(Mapping[str, tuple[str, ...]]):
    """Lower-case word to its synonyms; each word's list is split when it is asked for."""

    def __init__(self, lists: dict[str, str]) -> None:
        """`lists`: word to synonyms joined by ``|``."""
        self._lists = lists

    def __getitem__(self, word: str) -> tuple[str, ...]:
        return tuple(self._lists[word].split("|"))

    def __contains__(self, word: object) -> bool:
        return word in self._lists

    def __iter__(self) -> Iterator[str]:
        return iter(self._lists)

    def __len__(self) -> int:
        return len(self._lists)


@functools.cache
def load_synonyms() -> Synonyms:
    """The packaged synonyms: WordNet 3.0, all senses of a word."""
    table = resources.files("declip.data") / "demo" / "synonyms.tsv.gz"
    lines = gzip.decompress(table.read_bytes()).decode().splitlines()
    return Synonyms(dict(line.split("\t", 1) for line in lines))


def augment(text: str, synonyms: Mapping[str, tuple[str, ...]], views: CaptionViews, rng: np.random.Generator) -> str:
    """One easy data augmentation (Wei and Zou 2019, arXiv:1901.11196), drawn with the frequencies that `views` gives.

    A word is replaced by a synonym, two words are swapped, words are deleted, or a synonym is inserted; white space
    becomes single spaces.
    Single words are neither swapped nor deleted, a text without words comes back as it is.
    """
    words = text.split()
    draw = rng.random() * (views.synonym + views.swap + views.deletion + views.insertion)
    if not words:
        return text
    if draw < views.synonym:
        words = _replace_word(words, synonyms, rng)
    elif draw < views.synonym + views.swap:
        words = _swap_words(words, rng)
    elif draw < views.synonym + views.swap + views.deletion:
        words = _delete_words(words, views.deletion_share, rng)
    elif views.insertion > 0:
        words = _insert_word(words, synonyms, rng)
    return " ".join(words)


def _pick(count: int, rng: np.random.Generator) -> int:
    return int(rng.random() * count)  # three times faster than rng.integers


def _bare(word: str) -> str:
    return word.strip(_PUNCTUATION).lower()


def _replace_word(words: list[str], synonyms: Mapping[str, tuple[str, ...]], rng: np.random.Generator) -> list[str]:
    """A random word that has synonyms is replaced by one of them wherever it occurs; stopwords stay."""
    bare = [_bare(word) for word in words]
    # A word that occurs twice is one candidate; the dictionary keeps their order, a set would not.
    candidates = [word for word in dict.fromkeys(bare) if word in synonyms and word not in _STOPWORDS]
    if not candidates:
        return words
    chosen = candidates[_pick(len(candidates), rng)]
    choices = synonyms[chosen]
    synonym = choices[_pick(len(choices), rng)]
    return [_exchange(word, synonym) if core == chosen else word for word, core in zip(words, bare, strict=True)]


def _insert_word(words: list[str], synonyms: Mapping[str, tuple[str, ...]], rng: np.random.Generator) -> list[str]:
    """A synonym of a random word that has one comes in at a random place."""
    bare = [_bare(word) for word in words]
    candidates = [word for word in dict.fromkeys(bare) if word in synonyms and word not in _STOPWORDS]
    if not candidates:
        return words
    choices = synonyms[candidates[_pick(len(candidates), rng)]]
    words.insert(_pick(len(words) + 1, rng), choices[_pick(len(choices), rng)])
    return words


def _exchange(word: str, synonym: str) -> str:
    """The synonym with the punctuation that was around the word."""
    start = len(word) - len(word.lstrip(_PUNCTUATION))
    end = len(word.rstrip(_PUNCTUATION))
    return word[:start] + synonym + word[end:]


def _swap_words(words: list[str], rng: np.random.Generator) -> list[str]:
    """Two different positions change places. (textaugment may draw one position twice and then changes nothing.)"""
    if len(words) < 2:
        return words
    one, other = _pick(len(words), rng), _pick(len(words) - 1, rng)
    other += other >= one
    words[one], words[other] = words[other], words[one]
    return words


def _delete_words(words: list[str], share: float, rng: np.random.Generator) -> list[str]:
    """Each word goes with probability `share`; when all would go, a random one stays."""
    if len(words) < 2:
        return words
    kept = [word for word, draw in zip(words, rng.random(len(words)).tolist(), strict=True) if draw >= share]
    return kept or [words[_pick(len(words), rng)]]
