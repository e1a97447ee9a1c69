"""Nearest-neighbour supervision: captions of similar pairs are positives too (DeCLIP, §3.2, L_NNS)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.chunks import chunks
from declip.model.dual_encoder import Features
from declip.objectives.cross_entropy import cross_entropy
from declip.ranks import ALONE, Ranks

EMPTY = -1


class Neighbours(NamedTuple):
    """What was found for each text: [..., dim], int64 [...], int64 [...], bool [...].

    embeddings; ids: the samples they came from; places: equal where they are one and the same; found: whether any was
    """

    embeddings: Tensor
    ids: Tensor
    places: Tensor
    found: Tensor


class NearestNeighbour(nn.Module):
    """InfoNCE of each image view against the queue entry most like its own text, image -> text only.

    The queue is a ring of normalised text embeddings in persistent buffers, so it lives on the model's device and in
    its checkpoints: `queue` [size, dim], `queue_ids` [size] (the sample each entry came from), `pointer`. It is
    searched once for all text views, and the batch is entered after the search, the last text view first. As in the
    reference, what would pass the end of the ring is dropped and the pointer goes back to the start.

    enqueue: the text views that enter the ring, where not those whose neighbours are sought
    exclude_own: entries of the same sample are no neighbours, and a neighbour that belongs to the image's own sample,
        or is its own positive again, is no negative. Small sets are full of both; the reference excludes neither.
    top_k: so many entries are neighbours of a text, each of which is the positive of a loss of its own
    random_start: the ring starts full of random directions, as in the reference; otherwise the term is 0 until there
        is something to find.
    per_rank: with several ranks, each has a ring of its own, which its own texts enter, as in the reference; otherwise
        the ring is one and the same on all: each searches it for its own texts, and the texts of all enter it.
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
        per_rank: bool = False,
        top_k: int = 1,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.per_rank = per_rank
        self.own_buffers = ("queue", "queue_ids", "pointer") if per_rank else ()  # that differ from rank to rank
        self.enqueue = tuple(texts if enqueue is None else enqueue)
        self.images, self.texts, self.exclude_own = images, tuple(texts), exclude_own
        start = F.normalize(torch.randn(queue_size, dim), dim=-1) if random_start else torch.zeros(queue_size, dim)
        self.register_buffer("queue", start)
        # Random directions belong to no sample: -2 is no id, and not empty either.
        self.register_buffer("queue_ids", torch.full((queue_size,), -2 if random_start else EMPTY))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.found: tuple[Tensor, Tensor] | None = None  # what `_search` gave last: [text views × top_k, batch]

    def forward(self, features: Features, batch: Batch) -> Tensor:
        images, texts = features.unit_image[: self.images], features.unit_texts(self.texts)
        entering = None
        if self.training:
            entering = (features.unit_texts if self.per_rank else features.global_texts)(self.enqueue)
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
        [batch], which sample each row is; entering: [views, batch, dim], the texts that enter the ring, of all ranks
        where it is one for all, by default `texts`. Outside of training nothing enters.
        """
        texts = texts.detach()
        rows, found = self._search(texts.flatten(0, 1), sample_ids.repeat(len(texts)))
        rows, found = (torch.unflatten(x, 0, (len(texts), -1)).movedim(-1, 1).flatten(0, 1) for x in (rows, found))
        self.found = rows, found
        found_by_all = self._of_all_ranks(rows, found, ranks)
        # Of all that were found, wherever: a rank may have found none.
        weights = found.to(images.dtype) * ranks.count / (len(images) * found_by_all.found.sum().clamp(min=1))
        first, images = ranks.rank * images.shape[1], logit_scale * images
        losses = [
            self._loss_of_view(images, sample_ids, Neighbours(*view), own_weights, first)
            for *view, own_weights in zip(*found_by_all, weights, strict=True)
        ]
        if self.training:
            shared = ALONE if self.per_rank else ranks
            ids = shared.gather(sample_ids)
            for view in reversed(shared.gather(texts, dim=1) if entering is None else entering.detach()):
                self._enqueue(view, ids)
        return torch.stack(losses).sum()

    def _of_all_ranks(self, rows: Tensor, found: Tensor, ranks: Ranks) -> Neighbours:
        """The neighbours that all ranks have found, from the rows of this rank's queue: [text views, all] each."""
        if not self.per_rank:  # the ring is the same everywhere, so places in it are sent instead of embeddings
            rows = ranks.gather(rows, dim=1)
            return Neighbours(self.queue[rows], self.queue_ids[rows], rows, ranks.gather(found, dim=1))
        places = rows + ranks.rank * len(self.queue)
        own = Neighbours(self.queue[rows], self.queue_ids[rows], places, found)
        return Neighbours(*(ranks.gather(part, dim=1) for part in own))

    @torch.no_grad()
    def _search(self, texts: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the queue most like each text, and whether there are: [texts, dim] -> [texts, top_k] each."""
        rows = sample_ids.new_empty(len(sample_ids), self.top_k)
        found = torch.empty_like(rows, dtype=torch.bool)
        for part in chunks(len(texts), len(self.queue), texts):
            similarity = texts[part] @ self.queue.T
            similarity.masked_fill_(self.queue_ids == EMPTY, float("-inf"))
            if self.exclude_own:
                similarity.masked_fill_(sample_ids[part, None] == self.queue_ids, float("-inf"))
            if self.top_k == 1:
                best, rows[part] = similarity.max(dim=-1, keepdim=True)
            else:
                best, rows[part] = similarity.topk(self.top_k, dim=-1)
            found[part] = best != float("-inf")
        return rows, found

    def _loss_of_view(
        self,
        images: Tensor,
        sample_ids: Tensor,
        neighbours: Neighbours,
        weights: Tensor,
        first: int,
    ) -> Tensor:
        """The image views' cross-entropies against one text view's neighbours of all ranks, in their weighted sum."""
        right = torch.arange(first, first + len(sample_ids), device=sample_ids.device)

        def hide(logits: Tensor, part: slice) -> None:
            own = neighbours.ids == sample_ids[part, None]
            same = neighbours.places == neighbours.places[right[part], None]
            hidden = (own | same | ~neighbours.found).scatter_(1, right[part, None], False)
            logits.masked_fill_(hidden, float("-inf"))

        hiding = hide if self.exclude_own else None
        cells = [cross_entropy(image, neighbours.embeddings, right, weights, hiding) for image in images]
        return torch.stack(cells).sum()

    @torch.no_grad()
    def _enqueue(self, texts: Tensor, sample_ids: Tensor) -> None:
        size = len(self.queue)
        texts, sample_ids = texts[:size].to(self.queue.dtype), sample_ids[:size]
        places = self.pointer + torch.arange(len(texts), device=texts.device)
        # What passes the end stays as it was: nobody has to wait here for where the pointer stands.
        fits, places = places < size, places % size
        self.queue[places] = torch.where(fits[:, None], texts, self.queue[places])
        self.queue_ids[places] = torch.where(fits, sample_ids, self.queue_ids[places])
        self.pointer.copy_((self.pointer + len(texts)).clamp(max=size) % size)


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
