"""From pairs to batches: views are made in worker processes, in an order that is a pure function."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import chain
from typing import Any, get_args

import numpy as np
import torch
from torch.utils.data import Dataset

from declip.data.apart import Apart, CaptionFeatures, ImageFeatures, text_hash
from declip.data.batch import Batch
from declip.data.captions import NO_LABEL, lengthen, tokenize, tokenize_masked
from declip.data.decoded import Images
from declip.data.device_views import DRAWS, pack
from declip.data.filters import draw_filter, no_filter
from declip.data.kept import Kept, States
from declip.data.order import BatchOrder, Mixture, Order
from declip.data.pool import joined, sentences, singles
from declip.data.sources import BrokenPair, Concatenation
from declip.data.tokenizer import CaptionTokenizer, Tokenizer
from declip.data.words import augment, load_synonyms
from declip.data.workers import read_ahead
from declip.errors import InputError, RunStopped, first_line
from declip.recipe import Recipe
from declip.terms import JoinedView, SingleView


class BatchMaker(Dataset[Batch | InputError]):
    """Makes global batch number n, all views of it, from (seed, n) alone.

    full_captions: pad every caption to the context length, not only to the batch's longest.
    rank, ranks: which equal part of each global batch is made. The parts together are the same for any number.
    kept: what resting parts of towers have made of all pairs, in place of their pixels and tokens.
    local_size: side of small crops, where the recipe wants some.
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
        rank: int = 0,
        ranks: int = 1,
        kept: Kept | None = None,
        local_size: int = 0,
    ) -> None:
        self.images, self.recipe, self.size, self.context_length = images, recipe, image_size, context_length
        self.kept = kept or Kept()
        self.full_captions = full_captions
        self.tokenizer = tokenizer or Tokenizer()
        self.text_views = recipe.text_views  # worked out once, not for each pair
        strong = recipe.data.strong_images or recipe.data.images
        second = recipe.data.second_images or recipe.data.images
        self.image_views = [recipe.data.images, second][: recipe.pair_views]
        self.image_views += [strong] * (recipe.image_views - recipe.pair_views)
        self.local_views, self.local_size = [recipe.data.local_images] * recipe.local_views, local_size
        self.sizes = [image_size] * len(self.image_views) + [local_size] * len(self.local_views)
        self.crops_only = recipe.data.augment_on == "device" and self.kept.images is None
        self.single = [number for number, view in enumerate(self.text_views) if view in get_args(SingleView)]
        self.joined = [number for number, view in enumerate(self.text_views) if view in get_args(JoinedView)]
        repeats = bool(self.single or self.joined) and recipe.data.text.repeats == "augmented"
        self.synonyms = load_synonyms() if "augmented" in self.text_views or repeats else {}
        self.ends = images.caption_ends if recipe.data.text.pool == "each" else None
        self.items = len(images.source) if self.ends is None else int(self.ends[-1])
        self.order = self._order()
        batch_size, active = recipe.schedule.batch_size, recipe.terms.active().values()
        self.rows = range(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)
        self.wants_caption_ids = any(getattr(term, "equal_captions", None) == "positives" for term in active)

    def __getitem__(self, number: int) -> Batch | InputError:
        try:
            return self.make(number)
        except InputError as error:
            return error

    def _order(self) -> BatchOrder:
        recipe, source = self.recipe, self.images.source
        batch_size, data = recipe.schedule.batch_size, recipe.data
        order: BatchOrder
        if data.weights:
            if self.ends is not None or not isinstance(source, Concatenation):
                raise InputError(
                    "data.weights needs several sources in data.train, and goes with no data.text.pool=each."
                )
            parts = [
                Order(len(part), batch_size, recipe.seed, part.shards, data.shuffle_window, doubles=True)
                for part in source.sources
            ]
            order = Mixture(parts, data.weights, recipe.seed)
        else:
            shards = source.shards if self.ends is None else np.concatenate([[0], self.ends])[source.shards]
            order = Order(self.items, batch_size, recipe.seed, shards, data.shuffle_window)
        if data.keep_apart == "nothing":
            return order
        features = (CaptionFeatures if data.keep_apart == "captions" else ImageFeatures)(source)
        return Apart(order, features if self.ends is None else OfItems(features, self.ends))

    def tokens(self, number: int) -> np.ndarray:
        """Those of batch `number`, as `make` has them where all pairs can be read, without looking at a picture.

        int64 [text views, batch, longest]
        """
        items, indices, epochs = self._drawn_from(number)
        captions, rngs = [], self._rngs(number)
        for place, rng in zip(self.rows, rngs, strict=True):
            index = int(indices[place])
            pool = self.images.source.captions(index) or ("",)
            captions.append(self._draw(pool, index, int(items[place]), int(epochs[place]), rng))
        return self._texts(captions, rngs)[0]

    def _drawn_from(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of global batch `number` its items, the pair of each, and its epoch: int64 [batch].

        With pool=each an item is a caption, and the pair is the one that it belongs to.
        """
        items = self.order.batch(number)
        indices = items if self.ends is None else np.searchsorted(self.ends, items, side="right")
        return items, indices, self.order.epochs(number)

    def _rngs(self, number: int) -> list[np.random.Generator]:
        """Of the texts of each of this rank's rows."""
        first = number * self.order.batch_size
        return [np.random.default_rng([self.recipe.seed, first + place, 1]) for place in self.rows]

    def make(self, number: int) -> Batch:
        """Batch `number`, all views of it."""
        recipe, first = self.recipe, number * self.order.batch_size
        pairs: list[int] = []
        captions: list[list[str]] = []
        shown: list[int] = []  # which caption of all is the caption view
        broken: list[tuple[int, str, str]] = []
        of_all = len(self.image_views), len(self.rows)
        images = np.empty((*of_all, *((self.size, self.size) if self.kept.images is None else (0, 0)), 3), np.uint8)
        kept = None if self.kept.images is None else np.empty((*of_all, *self.kept.images.shape[2:]), np.float16)
        draws = np.empty((*images.shape[:2], DRAWS), np.float32) if self.crops_only else None
        local = np.empty((len(self.local_views), len(self.rows), self.local_size, self.local_size, 3), np.uint8)
        items, indices, epochs = self._drawn_from(number)
        taken, rngs = set(indices.tolist()), self._rngs(number)
        for row, (place, rng) in enumerate(zip(self.rows, rngs, strict=True)):
            index, pool, views = self._readable(int(indices[place]), first + place, taken, broken)
            pairs.append(index)
            captions.append(self._draw(pool, index, int(items[place]), int(epochs[place]), rng))
            if self.kept.texts is not None or self.kept.teacher_texts is not None:
                before = int(self.images.caption_ends[index - 1]) if index else 0
                shown.append(before + pool.index(captions[-1][self.text_views.index("caption")]))
            if kept is not None:
                kept[:, row] = views
                continue
            for which, (pixels, _) in enumerate(views[len(images) :]):
                local[which, row] = pixels
            for which, (pixels, view) in enumerate(views[: len(images)]):
                images[which, row] = pixels
                if draws is not None:
                    draws[which, row] = pack(view)
        nothing: tuple[np.ndarray, None] = np.empty((1, len(self.rows), 0), np.int64), None
        tokens, labels = nothing if self.kept.replaces_tokens else self._texts(captions, rngs)
        ids = None
        if self.wants_caption_ids and recipe.data.text.equal == "pair":
            own = (sorted(set(self.images.source.captions(index))) for index in pairs)
            ids = torch.tensor([[text_hash("\0".join(texts)) for texts in own]]).expand(len(self.text_views), -1)
        elif self.wants_caption_ids:
            ids = torch.tensor([[text_hash(text) for text in texts] for texts in zip(*captions, strict=True)])
        return Batch(
            images=torch.from_numpy(images),
            tokens=torch.from_numpy(tokens),
            text_views=tuple(self.text_views),
            labels=None if labels is None else torch.from_numpy(labels),
            sample_ids=torch.tensor(pairs),
            broken=tuple(broken),
            caption_ids=ids,
            draws=None if draws is None else torch.from_numpy(draws),
            kept_images=None if kept is None else torch.from_numpy(kept),
            kept_texts=None
            if self.kept.texts is None
            else torch.from_numpy(self.kept.captions(shown, tokens.shape[2])[None]),
            filters=self._filters(first),
            own_share=self._own_share(number),
            teacher_images=_rows(self.kept.teacher_images, pairs),
            teacher_texts=_rows(self.kept.teacher_texts, shown),
            local_images=torch.from_numpy(local) if self.local_views else None,
        )

    def _filters(self, first: int) -> torch.Tensor | None:
        """Of all views of the batch at place `first`; from a stream of their own, so that views stay as they are."""
        shares = [views.convolve for views in self.image_views]
        if not any(shares) or self.kept.images is not None:
            return None
        filters = np.tile(no_filter(), (len(shares), len(self.rows), 1, 1, 1, 1))
        for row, place in enumerate(self.rows):
            rng = np.random.default_rng([self.recipe.seed, first + place, 4])
            for which, share in enumerate(shares):
                if rng.random() < share:
                    filters[which, row] = draw_filter(rng)
        return torch.from_numpy(filters)

    def _own_share(self, number: int) -> float | None:
        """Of the images of global batch `number`: the same on all ranks."""
        alpha = self.recipe.data.mix
        return float(np.random.default_rng([self.recipe.seed, number, 3]).beta(alpha, alpha)) if alpha else None

    def _readable(
        self, index: int, place: int, taken: set[int], broken: list[tuple[int, str, str]]
    ) -> tuple[int, tuple[str, ...], Any]:
        """The pair itself, or, where it is broken, the next in storage that is not: its index, captions and views.

        Views are pixels with how each was drawn, or kept features [image views, width].
        """
        source = self.images.source
        for candidate in chain([index], self._stand_ins(index, place % self.order.batch_size, taken)):
            try:
                captions = source.captions(candidate)
                if not captions:
                    raise BrokenPair(source.key(candidate), source.where(candidate), "every caption is empty")
                # The views are the same whichever candidate it is.
                rng = np.random.default_rng([self.recipe.seed, place, 0])
                if self.kept.images is not None:
                    return candidate, captions, self.kept.views(source, candidate, len(self.image_views), rng)
                wanted = self.image_views + self.local_views
                views = self.images.views(candidate, self.sizes, wanted, rng, self.crops_only)
                return candidate, captions, views
            except BrokenPair as error:
                broken.append((candidate, error.where, error.reason))
        raise InputError(
            f"None of the {len(source)} pairs of {source.name} can be read; the first: {broken[0][1]}: {broken[0][2]}."
        )

    def _stand_ins(self, index: int, row: int, taken: set[int]) -> Iterator[int]:
        """The other pairs in storage order from `index` on; last those of this batch, which would be own negatives.

        First those that are this row's alone, so that no pair stands in for two, whichever rank makes their rows.
        """
        size, rows = len(self.images.source), self.order.batch_size
        for in_batch, mine in ((False, True), (False, False), (True, True), (True, False)):
            for step in range(1, size):
                other = (index + step) % size
                if (other in taken, other % rows == row) == (in_batch, mine):
                    yield other

    def _texts(
        self, captions: list[list[str]], rngs: list[np.random.Generator]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """All text views: tokens int64 [text views, batch, longest] and the masked view's labels [batch, longest]."""
        views, labels = [], None
        options, special = self.recipe.data.text, self.tokenizer.special
        for number, view in enumerate(self.text_views):
            texts = [texts[number] for texts in captions]
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
            labels = lengthen(labels, longest, NO_LABEL)
        return np.stack([lengthen(tokens, longest, special.pad) for tokens in views]), labels

    def _draw(self, pool: tuple[str, ...], index: int, item: int, epoch: int, rng: np.random.Generator) -> list[str]:
        """A pair's text for each text view: one of its captions, or what the view makes of all of them."""
        texts = self._pick(pool, index, item, epoch, rng)
        self._sample(texts, pool, rng)
        return texts

    def _pick(self, pool: tuple[str, ...], index: int, item: int, epoch: int, rng: np.random.Generator) -> list[str]:
        """One caption of a pair's for each text view."""
        options, count = self.recipe.data.text, len(self.text_views)
        if options.pool == "first":
            return [pool[0]] * count
        if options.pool == "each" and self.ends is not None:
            # A stand-in for a broken pair may have fewer captions.
            return [pool[(item - (int(self.ends[index - 1]) if index else 0)) % len(pool)]] * count
        if options.pool == "turn":
            return [pool[(epoch + view * options.independent) % len(pool)] for view in range(count)]
        if not options.independent:
            return [pool[rng.integers(len(pool))]] * count
        # Without replacement as long as the pool lasts: two views of one text say less than two captions.
        order = rng.permutation(len(pool))
        return [pool[order[view % len(pool)]] for view in range(count)]

    def _sample(self, texts: list[str], captions: tuple[str, ...], rng: np.random.Generator) -> None:
        """Put into a pair's texts, one a view, what the views that sample its captions show."""
        options = self.recipe.data.text
        pool = sentences(captions) if options.sentences and (self.joined or self.single) else captions
        alone = len(pool) == 1 and options.repeats == "augmented"  # joined views then repeat it as well
        for place, view in enumerate(self.joined):
            texts[view] = joined(pool, options.joined_most, rng)
            if alone and place:
                texts[view] = augment(texts[view], self.synonyms, options, rng)
        if self.single:
            drawn, new = singles(pool, len(self.single), rng)
            new = 0 if alone and self.joined else new
            for place, (view, text) in enumerate(zip(self.single, drawn, strict=True)):
                again = place >= new and options.repeats == "augmented"
                texts[view] = augment(text, self.synonyms, options, rng) if again else text


def _rows(embeddings: States | None, rows: list[int]) -> torch.Tensor | None:
    return None if embeddings is None else torch.from_numpy(embeddings[rows].astype(np.float32))


class OfItems:
    """What `Apart` asks of a pair, asked of the pair that a caption belongs to; its own captions are all equal."""

    def __init__(self, features: Callable[[int], Iterable[Hashable]], ends: np.ndarray) -> None:
        self.features, self.ends = features, ends

    def __call__(self, item: int) -> list[Hashable]:
        index = int(np.searchsorted(self.ends, item, side="right"))
        return [("image", index), *self.features(index)]


def make_loader(maker: BatchMaker, first: int, steps: int, workers: int) -> Iterator[Batch]:
    """Batches `first` … `steps - 1`, made `workers` processes ahead of the training step."""
    loader = read_ahead(
        maker,
        range(first, steps),
        workers,
        generator=torch.Generator(),  # else it draws from the global one, and a resumed run's dropout would differ
        prefetch_factor=4 if workers else None,
        worker_init_fn=_quiet_worker if workers else None,
    )
    with _deaths_between_steps():
        batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, EOFError, OSError) as error:
            # A worker that dies while its batch is fetched shows as a broken connection; what a worker raises itself
            # comes with its traceback as the message.
            own = isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)
            if not workers or own or "Caught " in str(error):
                raise
            # Killed from outside, mostly for memory.
            raise RunStopped(
                f"A loader process has died: {first_line(error)}. Where memory ran out, lower data.workers."
            ) from None
        if isinstance(batch, InputError):
            raise batch
        yield batch


@contextlib.contextmanager
def _deaths_between_steps() -> Iterator[None]:
    """Keep PyTorch from raising a worker's death wherever the training process is, say in the middle of a step.

    The loader notices it too, within seconds, when it waits for a batch.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def _quiet_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the training process's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not as the training process, from which it is inherited
    torch.set_num_threads(1)
