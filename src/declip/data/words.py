"""Captions with other words: easy data augmentation, and the synonyms that it draws from."""

from __future__ import annotations

import functools
import gzip
import string
from collections.abc import Iterator, Mapping
from importlib import resources

import numpy as np

from declip.pairs import CaptionViews

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
