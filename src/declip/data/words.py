"""Captions with other words: easy data augmentation, and the synonyms that it draws from."""

from __future__ import annotations

import functools
import gzip
import string
from collections.abc import Container, Iterator, Mapping
from importlib import resources
from math import log1p

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


class _Cores(dict[str, str]):
    """A word as it stands in a text to its bare lower-case form, or to "" where that has no synonym or is a stopword.

    What is asked for is kept, within bounds: most words of most texts are few.
    """

    def __init__(self, known: Container[str]) -> None:
        super().__init__()
        self._known = known

    def __missing__(self, word: str) -> str:
        core = word.strip(_PUNCTUATION).lower()
        core = core if core in self._known and core not in _STOPWORDS else ""
        if len(self) < 2**15 and len(word) <= 24:
            self[word] = core
        return core


class Synonyms(Mapping[str, tuple[str, ...]]):
    """Lower-case word to its synonyms; each word's list is split when it is asked for."""

    def __init__(self, lists: dict[str, str]) -> None:
        """`lists`: word to synonyms joined by ``|``."""
        self._lists = lists
        self._cores = _Cores(lists)
        self._split = functools.lru_cache(2**13)(self._split_list)  # most texts ask for the same few words

    def __reduce__(self) -> tuple[type[Synonyms], tuple[dict[str, str]]]:
        return Synonyms, (self._lists,)

    def cores(self, words: list[str]) -> list[str]:
        """The bare form of each word that has synonyms worth having, "" for each that has none."""
        return list(map(self._cores.__getitem__, words))

    def __getitem__(self, word: str) -> tuple[str, ...]:
        return self._split(word)

    def _split_list(self, word: str) -> tuple[str, ...]:
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
    Single words are neither swapped nor deleted, a text without words comes back as it is. `rng` is a default_rng.
    """
    words = text.split()
    if not words:
        return text
    # One raw number, of which each choice takes 16 bits: a drawn float costs as much as half of all else.
    bits = rng.bit_generator.random_raw()
    synonym, swap, deletion, insertion = views.synonym, views.swap, views.deletion, views.insertion
    draw = (bits & 0xFFFF) * (synonym + swap + deletion + insertion)
    bits >>= 16
    if draw < synonym * _SIXTEEN:
        words = _replace_word(words, synonyms, bits)
    elif draw < (synonym + swap) * _SIXTEEN:
        words = _swap_words(words, bits)
    elif draw < (synonym + swap + deletion) * _SIXTEEN:
        words = _delete_words(words, views.deletion_share, bits, rng)
    elif insertion > 0:
        words = _insert_word(words, synonyms, bits)
    return " ".join(words)


_SIXTEEN = 2**16


def _pick(count: int, bits: int) -> int:
    """One of `count`, by the lowest 16 bits."""
    return (bits & 0xFFFF) * count >> 16


def _words_with_synonyms(words: list[str], synonyms: Mapping[str, tuple[str, ...]]) -> tuple[list[str], list[str]]:
    """What `Synonyms.cores` gives, and those in it once each, in the order of the text."""
    cores = synonyms.cores(words) if isinstance(synonyms, Synonyms) else [*map(_Cores(synonyms).__missing__, words)]
    candidates = dict.fromkeys(cores)  # a set would not keep the order
    candidates.pop("", None)
    return cores, list(candidates)


def _replace_word(words: list[str], synonyms: Mapping[str, tuple[str, ...]], bits: int) -> list[str]:
    """A random word that has synonyms is replaced by one of them wherever it occurs; stopwords stay."""
    cores, candidates = _words_with_synonyms(words, synonyms)
    if not candidates:
        return words
    chosen = candidates[_pick(len(candidates), bits)]
    choices = synonyms[chosen]
    synonym = choices[_pick(len(choices), bits >> 16)]
    for at, core in enumerate(cores):
        if core == chosen:
            words[at] = synonym if words[at] == chosen else _exchange(words[at], synonym)
    return words


def _insert_word(words: list[str], synonyms: Mapping[str, tuple[str, ...]], bits: int) -> list[str]:
    """A synonym of a random word that has one comes in at a random place."""
    _, candidates = _words_with_synonyms(words, synonyms)
    if not candidates:
        return words
    choices = synonyms[candidates[_pick(len(candidates), bits)]]
    words.insert(_pick(len(words) + 1, bits >> 16), choices[_pick(len(choices), bits >> 32)])
    return words


def _exchange(word: str, synonym: str) -> str:
    """The synonym with the punctuation that was around the word."""
    start = len(word) - len(word.lstrip(_PUNCTUATION))
    end = len(word.rstrip(_PUNCTUATION))
    return word[:start] + synonym + word[end:]


def _swap_words(words: list[str], bits: int) -> list[str]:
    """Two different positions change places. (textaugment may draw one position twice and then changes nothing.)"""
    if len(words) < 2:
        return words
    one, other = _pick(len(words), bits), _pick(len(words) - 1, bits >> 16)
    other += other >= one
    words[one], words[other] = words[other], words[one]
    return words


def _delete_words(words: list[str], share: float, bits: int, rng: np.random.Generator) -> list[str]:
    """Each word goes with probability `share`; when all would go, a random one stays."""
    if len(words) < 2 or not share:
        return words
    # How many words stay before the next one goes is geometric: a draw for each that goes, not for each there is.
    scale = 1 / log1p(-share) if share < 1 else 0.0
    at, draw = 0, (bits >> 16) * 2.0**-32
    last = words[_pick(len(words), bits)]
    while (at := at + int(log1p(-draw) * scale)) < len(words):
        del words[at]
        draw = (rng.bit_generator.random_raw() >> 11) * 2.0**-53
    return words or [last]
