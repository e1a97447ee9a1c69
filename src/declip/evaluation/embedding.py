"""A model's embeddings of a source's images and captions; what cannot be read is counted and named.

Images are decoded and brought to the model's size by loader processes while the model embeds those before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from declip.data.decode import decode_image
from declip.data.sources import BrokenPair, Source
from declip.data.workers import read_ahead
from declip.errors import InputError
from declip.progress import Progress

if TYPE_CHECKING:
    import numpy as np

# Images go to the model in groups of at most so many, and of at most so many bytes: photos of twelve megapixels, which
# a model that is not ours may want whole, must not fill the memory.
_IMAGES_AT_ONCE = 256
_BYTES_AT_ONCE = 2**28
_TEXTS_AT_ONCE = 4096
_READ_AT_ONCE = 32  # pairs that a loader process reads for one answer
_FEW = 512  # pairs for which no loader process is started
_NAMED = 20  # broken pairs whose places are kept


class Encoder(Protocol):
    """What a model must be able to do to be judged. Ours also has `prepare` and `encode_prepared`, see `LoadedModel`.

    encode_image takes uint8 [height, width, 3] each; both give normalised embeddings [n, width], or tokens
    [n, tokens, width] of a model that compares those.
    """

    name: str

    def encode_image(self, images: list[Any]) -> Any: ...

    def encode_text(self, texts: list[str]) -> Any: ...


@dataclass
class Embedded:
    """A source's pairs as a model sees them.

    images: float32 [images, width], embeddings of those that decode; rows: int64 [images], their places in the source
    captions, labels: of every pair of the source
    unreadable: places of the pairs whose image cannot be read: whatever is asked of them is missed, so that a broken
        file does not make a test easier
    broken: the first few of them, each in a few words
    """

    images: Tensor
    rows: Tensor
    captions: list[tuple[str, ...]] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    unreadable: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


class _Item(NamedTuple):
    row: int
    image: Any  # as the model takes it; None where it cannot be read
    captions: tuple[str, ...]
    label: str | None
    reason: str = ""


class _Reader(Dataset[list[_Item]]):
    """Reads pairs, a range at a time, and prepares their images for a model."""

    def __init__(self, source: Source, prepare: Callable[[bytes], Any]) -> None:
        self.source, self.prepare = source, prepare

    def __getitem__(self, indices: range) -> list[_Item]:
        return [self.read(index) for index in indices]

    def read(self, index: int) -> _Item:
        try:
            pair = self.source[index]
        except BrokenPair as error:
            return _Item(index, None, self.source.captions(index), self.source.label(index), str(error))
        try:
            return _Item(index, self.prepare(pair.image), pair.captions, pair.label)
        except ValueError as error:
            return _Item(index, None, pair.captions, pair.label, f"{pair.where} (key {pair.key}): {error}")


def embed_source(
    model: Encoder, source: Source, name: str, progress: Progress | None = None, workers: int | None = None
) -> Embedded:
    """Embed all images of a source called `name`.

    workers: loader processes that read them; by default as many as there are spare cores, none for a few hundred pairs.
    Raises InputError where no image at all can be read, or an embedding has a value that is no number.
    """
    count = len(source)
    found = Embedded(torch.empty(0), torch.empty(0), [()] * count, [None] * count)
    parts: list[Tensor] = []
    rows: list[int] = []
    encode: Callable[[Any], Any] = getattr(model, "encode_prepared", model.encode_image)
    reader = _Reader(source, getattr(model, "prepare", decode_image))
    for images, indices, done in _groups(_items(reader, count, workers), found):
        if images:
            parts.append(torch.as_tensor(encode(images)).float().cpu())
            rows += indices
        if progress:
            progress(f"images of {name}", done, count)
    if not rows:
        raise InputError(f"{name}: all {count} pairs are broken; the first: {found.broken[0].rstrip('.')}.")
    found.images, found.rows = torch.cat(parts), torch.tensor(rows)
    check_finite(found.images, f"{model.name} gives, for {name},")
    return found


def patches_of(
    model: Any, source: Source, name: str, rows: Container[int], progress: Progress | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Of the images in these rows of a source the row and the patches [patches, width], a few images at a time."""
    count = len(source)
    noted = Embedded(torch.empty(0), torch.empty(0), [()] * count, [None] * count)
    for images, indices, done in _groups(_items(_Reader(source, model.prepare), count, None), noted):
        if images:
            yield from ((row, own) for row, own in zip(indices, model.patches(images), strict=True) if row in rows)
        if progress:
            progress(f"patches of {name}", done, count)


def _items(reader: _Reader, count: int, workers: int | None) -> Iterator[_Item]:
    """All items in order; without loader processes one after the other, so that large images are not held together."""
    if workers is None:
        workers = min(4, max(1, (os.cpu_count() or 1) - 1)) if count >= _FEW else 0
    if not workers:
        yield from map(reader.read, range(count))
        return
    ranges = [range(start, min(start + _READ_AT_ONCE, count)) for start in range(0, count, _READ_AT_ONCE)]
    for items in read_ahead(reader, ranges, workers, prefetch_factor=8, worker_init_fn=_one_thread):
        yield from items


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _groups(items: Iterable[_Item], found: Embedded) -> Iterator[tuple[list[np.ndarray], list[int], int]]:
    """Images in bounded groups, their places, and how many pairs are done; notes captions, labels and breakage."""
    images: list[Any] = []
    indices: list[int] = []
    size = done = 0
    for item in items:
        done += 1
        found.captions[item.row], found.labels[item.row] = item.captions, item.label
        if item.image is None:
            found.unreadable.append(item.row)
            if len(found.broken) < _NAMED:
                found.broken.append(item.reason)
            continue
        images.append(item.image)
        indices.append(item.row)
        size += item.image.nbytes
        if len(images) == _IMAGES_AT_ONCE or size >= _BYTES_AT_ONCE:
            yield images, indices, done
            images, indices, size = [], [], 0
    yield images, indices, done


def embed_texts(model: Encoder, texts: Sequence[str], what: str, progress: Progress | None = None) -> Tensor:
    """float32 [texts, width], or [texts, tokens, width]; raises InputError where a value is no number."""
    parts = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        group = list(texts[start : start + _TEXTS_AT_ONCE])
        parts.append(torch.as_tensor(model.encode_text(group)).float().cpu())
        if progress:
            progress(what, start + len(group), len(texts))
    embeddings = torch.cat(parts)
    check_finite(embeddings, f"{model.name} gives, for {what},")
    return embeddings


def check_finite(embeddings: Tensor, whose: str) -> None:
    """Raise InputError where an embedding has a NaN or an infinity: every figure made of it would be a fiction."""
    wrong = (~embeddings.isfinite()).flatten(1).any(1)
    if wrong.any():
        raise InputError(
            f"{whose} {int(wrong.sum()):,} of {len(wrong):,} embeddings with values that are no numbers (the first is "
            f"number {int(wrong.nonzero()[0])}): the weights are broken or overflow; judge an earlier checkpoint."
        )
