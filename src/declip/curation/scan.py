"""One pass over a source: a few hundred bytes are kept of each pair, whatever its images weigh."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from declip.curation.fingerprints import THUMBNAIL, fingerprint, hash_bytes
from declip.curation.processes import in_processes
from declip.curation.words import caption_hash, not_language, script
from declip.data.sources import BrokenPair, Source
from declip.data.tokenizer import Tokenizer
from declip.progress import Progress

EXAMPLES = 8
"""Places that are kept of each thing found."""

_CHUNK = 128  # pairs that a process works through at a time

PAIR = np.dtype(
    [
        ("broken", "?"),
        ("width", "i4"),
        ("height", "i4"),
        ("data_bytes", "i8"),
        ("data_hash", "u8"),
        ("pixel_hash", "u8"),
        ("perceptual_hash", "u8"),
        ("key_hash", "u8"),
        ("captions", "i4"),
        ("labelled", "?"),
    ]
)
CAPTION = np.dtype([("pair", "i8"), ("hash", "i8"), ("tokens", "i4"), ("characters", "i4")])


@dataclass
class Scan:
    """What is known of a source's pairs.

    pairs: PAIR [pairs]; thumbnails: uint8 [pairs, THUMBNAIL]; captions: CAPTION [captions], of all pairs one after the
    other; kinds, scripts: how often each; broken, odd: by reason, how many and the first indices; labels: how often
    each class name.
    """

    source: Source
    pairs: NDArray[np.void]
    thumbnails: NDArray[np.uint8]
    captions: NDArray[np.void]
    kinds: Counter[str] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    broken: dict[str, Found] = field(default_factory=dict)
    odd: dict[str, Found] = field(default_factory=dict)

    @property
    def whole(self) -> NDArray[np.int64]:
        """Indices of the pairs whose image can be read."""
        return np.flatnonzero(~self.pairs["broken"])


@dataclass
class Found:
    """How many, and the first of them: index of the pair and what was seen there."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, count: int, first: Sequence[tuple[int, str]]) -> None:
        self.count += count
        self.first += first[: EXAMPLES - len(self.first)]


@dataclass
class _Part:
    """The same of some pairs, on the way from one process to the other."""

    pairs: NDArray[np.void]
    thumbnails: NDArray[np.uint8]
    captions: list[tuple[int, int, int, int]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    broken: dict[str, Found] = field(default_factory=dict)
    odd: dict[str, Found] = field(default_factory=dict)


def scan(source: Source, workers: int, progress: Progress | None = None, what: str = "reading pairs") -> Scan:
    """Read every pair once, in `workers` processes (0: in this one). The result does not depend on their number.

    Raises RunStopped where a process was killed, mostly for memory.
    """
    count = len(source)
    whole = Scan(source, np.zeros(count, PAIR), np.zeros((count, THUMBNAIL), np.uint8), np.empty(0, CAPTION))
    captions, done = [], 0
    for part in _parts(source, workers):
        end = done + len(part.pairs)
        whole.pairs[done:end], whole.thumbnails[done:end] = part.pairs, part.thumbnails
        captions.append(np.array(part.captions, CAPTION))
        for name in ("kinds", "scripts", "labels"):
            getattr(whole, name).update(getattr(part, name))
        for name in ("broken", "odd"):
            for reason, found in getattr(part, name).items():
                getattr(whole, name).setdefault(reason, Found()).add(found.count, found.first)
        done = end
        if progress:
            progress(what, done, count)
    whole.captions = np.concatenate(captions) if captions else whole.captions
    return whole


def _parts(source: Source, workers: int) -> Iterator[_Part]:
    chunks = [range(low, min(low + _CHUNK, len(source))) for low in range(0, len(source), _CHUNK)]
    Tokenizer()  # loaded here, forked processes share it
    died = "A process that reads pairs has died. Where memory ran out, take fewer processes with --workers."
    return in_processes(_Look, (source,), chunks, workers, died=died)


def short_reason(reason: str) -> str:
    """Without a file's name in front, which would make each a reason of its own."""
    return reason.rpartition(": ")[2]


class _Look:
    """Looks at some pairs of a source."""

    def __init__(self, source: Source) -> None:
        self.source, self.named, self.tokenizer = source, source.named, Tokenizer()

    def __call__(self, indices: range) -> _Part:
        part = _Part(np.zeros(len(indices), PAIR), np.zeros((len(indices), THUMBNAIL), np.uint8))
        for row, index in enumerate(indices):
            if self.named:  # equal rows of two files say nothing
                key = self.source.key(index)
                part.pairs[row]["key_hash"] = hash_bytes(key.encode("utf-8", "surrogatepass"))
            captions = self.source.captions(index)
            part.pairs[row]["captions"] = len(captions)
            self._captions(part, index, captions)
            try:
                self._image(part, row, index)
            except BrokenPair as error:
                part.pairs[row]["broken"] = True
                part.broken.setdefault(short_reason(error.reason), Found()).add(1, [(index, error.where)])
        return part

    def _image(self, part: _Part, row: int, index: int) -> None:
        pair = self.source[index]
        if pair.label is not None:
            part.pairs[row]["labelled"] = True
            part.labels[pair.label] += 1
        try:
            seen = fingerprint(pair.image)
        except ValueError as error:
            raise BrokenPair(pair.key, pair.where, str(error)) from None
        for name in ("width", "height", "data_hash", "pixel_hash", "perceptual_hash"):
            part.pairs[row][name] = getattr(seen, name)
        part.pairs[row]["data_bytes"] = len(pair.image)
        part.thumbnails[row] = seen.thumbnail
        part.kinds[seen.kind] += 1

    def _captions(self, part: _Part, index: int, captions: Sequence[str]) -> None:
        for text in captions:
            tokens = len(self.tokenizer.encode(text)) + 2  # with start and end
            part.captions.append((index, caption_hash(text), tokens, len(text)))
            part.scripts[script(text)] += 1
            if reason := not_language(text):
                part.odd.setdefault(reason, Found()).add(1, [(index, text[:200])])
