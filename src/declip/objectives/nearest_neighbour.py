"""Nearest-neighbour supervision: captions of similar pairs are positives too (DeCLIP, §3.2, L_NNS)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.chunks import chunks
from declip.model.dual_encoder import Features
from declip.objectives.cross_entropy import cross_entropy
from declip.ranks import ALONE, Ranks

EMPTY = -1


class NearestNeighbour(nn.Module):
    """InfoNCE of each image view against the queue entry most like its own text, image -> text only.

    The queue is a ring of normalised text embeddings in persistent buffers, so it lives on the model's device and in
    its checkpoints: `queue` [size, dim], `queue_ids` [size] (the sample each entry came from), `pointer`. It is
    searched once for all text views, and the batch is entered after the search, the last text view first. As in the
    reference, what would pass the end of the ring is dropped and the pointer goes back to the start.

    enqueue: the text views that enter the ring, where not those whose neighbours are sought
    exclude_own: entries of the same sample are no neighbours, and a neighbour that belongs to the image's own sample,
        or is its own positive again, is no negative. Small sets are full of both; the reference excludes neither.
    With several ranks the ring is one and the same on all: each searches it for its own texts, and the texts of all
    enter it.

    random_start: the ring starts full of random directions, as in the reference; otherwise the term is 0 until there
        is something to find.
    """

    queue: Tensor
    queue_ids: Tensor
    pointer: Tensor

    def __init__(
        self,
        dim: int,
        queue_size: int,
        images: int,
        texts: Sequence[str],
        exclude_own: bool = True,
        random_start: bool = False,
        enqueue: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.enqueue = tuple(texts if enqueue is None else enqueue)
        self.images, self.texts, self.exclude_own = images, tuple(texts), exclude_own
        start = F.normalize(torch.randn(queue_size, dim), dim=-1) if random_start else torch.zeros(queue_size, dim)
        self.register_buffer("queue", start)
        # Random directions belong to no sample: -2 is no id, and not empty either.
        self.register_buffer("queue_ids", torch.full((queue_size,), -2 if random_start else EMPTY))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.found: tuple[Tensor, Tensor] | None = None  # what `_search` gave last, [text views, batch] each

    def forward(self, features: Features, batch: Batch) -> Tensor:
        images, texts = features.unit_image[: self.images], features.unit_texts(self.texts)
        entering = features.global_texts(self.enqueue) if self.training else None
        return self.loss(images, texts, features.logit_scale, batch.sample_ids, entering, features.ranks)

    def loss(
        self,
        images: Tensor,
        texts: Tensor,
        logit_scale: Tensor,
        sample_ids: Tensor,
        entering: Tensor | None = None,
        ranks: Ranks = ALONE,
    ) -> Tensor:
        """On tensors alone: the mean over image views v and text views u of CE(s · I_v N(T_u)ᵀ), N the neighbours.

        images: [image views, batch, dim] and texts: [text views, batch, dim], both normalised; sample_ids: int64
        [batch], which sample each row is; entering: [views, batch of all ranks, dim], the texts that enter the ring, by
        default `texts`. Outside of training nothing enters.
        """
        texts = texts.detach()
        rows, found = self._search(texts.flatten(0, 1), sample_ids.repeat(len(texts)))
        rows, found = (torch.unflatten(x, 0, (len(texts), -1)) for x in (rows, found))
        self.found = rows, found
        # The ring is the same everywhere, so ranks tell one another places in it instead of embeddings.
        global_rows, global_found = ranks.gather(rows, dim=1), ranks.gather(found, dim=1)
        loss = images.new_zeros(())
        if global_found.any():
            # Of all that were found, wherever: a rank may have found none.
            weights = found.to(images.dtype) * ranks.count / (len(images) * global_found.sum())
            first, images = ranks.rank * images.shape[1], logit_scale * images
            for view in zip(rows, global_rows, global_found, weights, strict=True):
                loss = loss + self._loss_of_view(images, sample_ids, *view, first)
        if self.training:
            ids = ranks.gather(sample_ids)
            for view in reversed(ranks.gather(texts, dim=1) if entering is None else entering.detach()):
                self._enqueue(view, ids)
        return loss

    @torch.no_grad()
    def _search(self, texts: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The row of the queue most like each text, and whether there is one: [texts, dim] -> int64, bool [texts]."""
        rows, found = torch.empty_like(sample_ids), torch.empty_like(sample_ids, dtype=torch.bool)
        for part in chunks(len(texts), len(self.queue), texts):
            similarity = texts[part] @ self.queue.T
            similarity.masked_fill_(self.queue_ids == EMPTY, float("-inf"))
            if self.exclude_own:
                similarity.masked_fill_(sample_ids[part, None] == self.queue_ids, float("-inf"))
            best, rows[part] = similarity.max(dim=-1)
            found[part] = best != float("-inf")
        return rows, found

    def _loss_of_view(
        self,
        images: Tensor,
        sample_ids: Tensor,
        rows: Tensor,
        all_rows: Tensor,
        all_found: Tensor,
        weights: Tensor,
        first: int,
    ) -> Tensor:
        """The image views' cross-entropies against one text view's neighbours of all ranks, in their weighted sum."""
        right = torch.arange(first, first + len(rows), device=rows.device)

        def hide(logits: Tensor, part: slice) -> None:
            own = self.queue_ids[all_rows] == sample_ids[part, None]
            hidden = (own | (all_rows == rows[part, None]) | ~all_found).scatter_(1, right[part, None], False)
            logits.masked_fill_(hidden, float("-inf"))

        neighbours, hiding = self.queue[all_rows], hide if self.exclude_own else None
        cells = [cross_entropy(image, neighbours, right, weights, hiding) for image in images]
        return torch.stack(cells).sum()

    @torch.no_grad()
    def _enqueue(self, texts: Tensor, sample_ids: Tensor) -> None:
        start, size = int(self.pointer), self.queue.shape[0]
        end = min(start + texts.shape[0], size)
        self.queue[start:end] = texts[: end - start].to(self.queue.dtype)
        self.queue_ids[start:end] = sample_ids[: end - start]
        self.pointer.fill_(end % size)


def mean_age(pointer: int, size: int, full: bool, batch: int, views: int) -> float | None:
    """Steps since the entries of the queue came in, on average, as the next search finds them; None where it is empty.

    pointer: where the next entry goes; full: whether the last place is taken; batch: rows that each of `views` text
    views enters a step, which was the same all the time. Random directions that the queue began with do not count.
    """
    writes = math.ceil(size / batch)  # of a lap; the last is cut off at the end of the ring
    newest = (math.ceil(pointer / batch) - 1) % writes
    if not full and pointer == 0:
        return None
    first = range(writes if full else newest + 1)
    ages = [(newest - write) % writes // views + 1 for write in first]
    entries = [min(batch, size - write * batch) for write in first]
    return sum(age * count for age, count in zip(ages, entries, strict=True)) / sum(entries)
