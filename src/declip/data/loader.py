"""From pairs to batches: views are made in worker processes, in an order that is a pure function."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from declip.data.batch import Batch
from declip.data.captions import CaptionTokenizer, Tokenizer, augment, load_synonyms, tokenize, tokenize_masked
from declip.data.images import decode_image, random_view
from declip.data.order import Order
from declip.data.sources import BrokenPair, Source
from declip.errors import InputError
from declip.recipe import Recipe


@dataclass
class Images:
    """Decoded images of a source: kept in memory when all fit, decoded on demand otherwise."""

    source: Source
    kept: list[np.ndarray | BrokenPair] | None

    def get(self, index: int) -> np.ndarray:
        """uint8 [height, width, 3]; raises BrokenPair."""
        image = self.kept[index] if self.kept is not None else _decode(self.source, index)
        if isinstance(image, BrokenPair):
            raise image
        return image


def open_images(source: Source, limit_gb: float, broken_limit: float) -> Images:
    """Decode a source once when it fits in `limit_gb`; raises InputError when too many pairs are broken."""
    if len(source) * _mean_decoded_bytes(source) > limit_gb * 2**30:
        return Images(source, None)
    with ThreadPoolExecutor(2) as pool:
        kept = list(pool.map(lambda index: _try_decode(source, index), range(len(source))))
    broken = [image for image in kept if isinstance(image, BrokenPair)]
    check_broken(len(broken), broken[0] if broken else None, len(source), broken_limit)
    for pair in broken:
        print(f"skipped: {pair}", file=sys.stderr)
    return Images(source, kept)


def check_broken(count: int, first: BrokenPair | None, size: int, limit: float) -> None:
    """Raise InputError when more than `limit` of the pairs are broken."""
    if first is not None and count > limit * size:
        raise InputError(
            f"{count} of {size} pairs are broken, more than data.broken_limit = {limit:g} allows; the first: {first}."
        )


def _decode(source: Source, index: int) -> np.ndarray:
    pair = source[index]
    try:
        return decode_image(pair.image)
    except ValueError as error:
        raise BrokenPair(pair.key, pair.where, str(error)) from None


def _try_decode(source: Source, index: int) -> np.ndarray | BrokenPair:
    try:
        return _decode(source, index)
    except BrokenPair as error:
        return error


def _mean_decoded_bytes(source: Source, samples: int = 64) -> float:
    """Mean size of a decoded image, from the headers of a few spread over the set."""
    from PIL import Image, UnidentifiedImageError

    sizes = []
    for index in np.linspace(0, len(source) - 1, min(samples, len(source))).astype(int):
        try:
            with Image.open(io.BytesIO(source[int(index)].image)) as image:
                sizes.append(image.width * image.height * 3)
        except (BrokenPair, UnidentifiedImageError, OSError):
            continue
    return float(np.mean(sizes)) if sizes else 0.0


class BatchMaker(Dataset[Batch | InputError]):
    """Makes global batch number n, all views of it, from (seed, n) alone.

    full_captions: pad every caption to the context length, not only to the batch's longest.
    Where no pair can be read it gives the InputError back: raised in a worker, it would come out as a traceback.
    """

    def __init__(
        self,
        images: Images,
        recipe: Recipe,
        image_size: int,
        context_length: int,
        tokenizer: CaptionTokenizer | None = None,
        full_captions: bool = False,
    ) -> None:
        self.images, self.recipe, self.size, self.context_length = images, recipe, image_size, context_length
        self.full_captions = full_captions
        self.order = Order(len(images.source), recipe.schedule.batch_size, recipe.seed)
        self.tokenizer = tokenizer or Tokenizer()
        self.text_views = recipe.text_views  # worked out once, not for each pair
        strong = recipe.data.strong_images or recipe.data.images
        self.image_views = [recipe.data.images] * recipe.pair_views
        self.image_views += [strong] * (recipe.image_views - recipe.pair_views)
        self.synonyms = load_synonyms() if "augmented" in self.text_views else {}

    def __getitem__(self, number: int) -> Batch | InputError:
        try:
            return self.make(number)
        except InputError as error:
            return error

    def make(self, number: int) -> Batch:
        """Batch `number`, all views of it."""
        recipe, rows, first = self.recipe, [], number * self.order.batch_size
        broken: list[tuple[int, str, str]] = []
        images = np.empty((len(self.image_views), self.order.batch_size, self.size, self.size, 3), np.uint8)
        order = self.order.batch(number).tolist()
        taken = set(order)
        for row, wanted in enumerate(order):
            index, image = self._readable(wanted, taken, broken)
            taken.add(index)
            rows.append(index)
            rng = np.random.default_rng([recipe.seed, first + row, 0])
            for view, options in enumerate(self.image_views):
                images[view, row] = random_view(image, self.size, options, rng)
        rngs = [np.random.default_rng([recipe.seed, first + row, 1]) for row in range(len(rows))]
        tokens, labels = self._texts(rows, rngs)
        return Batch(
            images=torch.from_numpy(images),
            tokens=torch.from_numpy(tokens),
            text_views=tuple(self.text_views),
            labels=None if labels is None else torch.from_numpy(labels),
            sample_ids=torch.tensor(rows),
            broken=tuple(broken),
        )

    def _readable(self, index: int, taken: set[int], broken: list[tuple[int, str, str]]) -> tuple[int, np.ndarray]:
        """The pair itself, or, where it is broken, the next one in storage that is not: its index and its image."""
        for candidate in chain([index], self._stand_ins(index, taken)):
            try:
                if not self.images.source.captions(candidate):
                    raise BrokenPair(self.images.source.key(candidate), f"pair {candidate}", "every caption is empty")
                return candidate, self.images.get(candidate)
            except BrokenPair as error:
                broken.append((candidate, error.where, error.reason))
        raise InputError(f"None of the {len(self.images.source)} pairs of {self.images.source.name} can be read.")

    def _stand_ins(self, index: int, taken: set[int]) -> Iterator[int]:
        """The other pairs in storage order from `index` on; last those of this batch, which would be own negatives."""
        size = len(self.images.source)
        for in_batch in (False, True):
            for step in range(1, size):
                candidate = (index + step) % size
                if (candidate in taken) == in_batch:
                    yield candidate

    def _texts(self, rows: list[int], rngs: list[np.random.Generator]) -> tuple[np.ndarray, np.ndarray | None]:
        """All text views: tokens int64 [text views, batch, longest] and the masked view's labels [batch, longest]."""
        views, labels = [], None
        options, special = self.recipe.data.text, self.tokenizer.special
        drawn = [self._draw(index, rng) for index, rng in zip(rows, rngs, strict=True)]
        for number, view in enumerate(self.text_views):
            texts = [captions[number] for captions in drawn]
            if view == "augmented":
                texts = [augment(text, self.synonyms, options, rng) for text, rng in zip(texts, rngs, strict=True)]
            ids = [self.tokenizer.encode(text) for text in texts]
            if view == "masked":
                tokens, labels = tokenize_masked(ids, self.context_length, options.mask, rngs, special)
            else:
                tokens = tokenize(ids, self.context_length, special)
            views.append(tokens)
        longest = self.context_length if self.full_captions else max(tokens.shape[1] for tokens in views)
        if labels is not None:
            labels = np.pad(labels, ((0, 0), (0, longest - labels.shape[1])), constant_values=-100)
        padded = [np.pad(t, ((0, 0), (0, longest - t.shape[1])), constant_values=special.pad) for t in views]
        return np.stack(padded), labels

    def _draw(self, index: int, rng: np.random.Generator) -> list[str]:
        """One caption for each text view."""
        pool, options, count = self.images.source.captions(index), self.recipe.data.text, len(self.text_views)
        if options.pool == "first":
            return [pool[0]] * count
        if not options.independent:
            return [pool[rng.integers(len(pool))]] * count
        # Without replacement as long as the pool lasts: two views of one text say less than two captions.
        order = rng.permutation(len(pool))
        return [pool[order[view % len(pool)]] for view in range(count)]


def make_loader(maker: BatchMaker, first: int, steps: int, workers: int) -> Iterator[Batch]:
    """Batches `first` … `steps - 1`, made `workers` processes ahead of the training step."""
    loader = DataLoader(
        maker,
        batch_size=None,
        sampler=range(first, steps),
        generator=torch.Generator(),  # else it draws from the global one, and a resumed run's dropout would differ
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_quiet_worker if workers else None,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _quiet_worker(_: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the training process's to handle
    torch.set_num_threads(1)
