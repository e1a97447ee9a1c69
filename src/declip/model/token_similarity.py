"""Similarity between sets of tokens: the mean over one side's tokens of the best match on the other (FILIP)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from declip.model.chunks import chunks


class MeanBestMatch(torch.autograd.Function):
    """The mean over a query's tokens of the best similarity among an item's tokens, and the other way round.

    Only one chunk of the similarities [queries × tokens, items × tokens] exists at a time. Which token was best is kept
    (one byte each), so that the backward pass multiplies no more matrices than the naive form does.

    queries: [batch, n, width], items: [count, m, width]
    query_weights: [batch, n], the share of each token in the mean; item_weights: [count, m], likewise for the way back
    item_mask: bool [count, m], which tokens may be found; None where all may
    both: whether the way back is wanted
    Returns [batch, count] and, where `both`, [batch, count] for the way back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        items: Tensor,
        query_weights: Tensor,
        item_weights: Tensor,
        item_mask: Tensor | None,
        both: bool,
    ) -> tuple[Tensor, Tensor | None]:
        batch, n, _ = queries.shape
        count, m, _ = items.shape
        there, back = queries.new_empty(batch, count), queries.new_empty(batch, count) if both else None
        found = torch.empty(batch, n, count, dtype=_index_type(m), device=queries.device)
        found_back = torch.empty(batch, count, m, dtype=_index_type(n), device=queries.device) if both else None
        for part in _chunks(queries, items):
            similarity = (queries.flatten(0, 1) @ items[part].flatten(0, 1).T).view(batch, n, -1, m)
            if back is not None and found_back is not None:
                best, where = similarity.max(dim=1)
                found_back[:, part] = where
                back[:, part] = (best * item_weights[part]).sum(dim=-1)
            if item_mask is not None:
                similarity.masked_fill_(~item_mask[part], float("-inf"))
            best, where = similarity.max(dim=-1)
            found[:, :, part] = where
            there[:, part] = (best * query_weights[:, :, None]).sum(dim=1)
        ctx.save_for_backward(queries, items, query_weights, item_weights, found, found_back)
        return there, back

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, items, query_weights, item_weights, found, found_back = ctx.saved_tensors
        batch, n, width = queries.shape
        grad_queries, grad_items = torch.zeros_like(queries), torch.empty_like(items)
        for part in _chunks(queries, items):
            some = items[part]
            grad = queries.new_zeros(batch, n, *some.shape[:2])
            to_best = gradients[0][:, None, part] * query_weights[:, :, None]
            grad.scatter_(-1, found[:, :, part, None].long(), to_best[..., None])
            if found_back is not None:
                to_best = gradients[1][:, part, None] * item_weights[part]
                grad.scatter_add_(1, found_back[:, None, part].long(), to_best[:, None])
            flat = grad.view(batch * n, -1)
            grad_queries.view(-1, width).addmm_(flat, some.flatten(0, 1))
            grad_items[part] = (flat.T @ queries.flatten(0, 1)).view_as(some)
        return grad_queries, grad_items, None, None, None, None


def _index_type(tokens: int) -> torch.dtype:
    return torch.uint8 if tokens <= 256 else torch.int32


def _chunks(queries: Tensor, items: Tensor) -> list[slice]:
    """Slices of the items, as many at once as memory allows."""
    return chunks(items.shape[0], queries.shape[0] * queries.shape[1] * items.shape[1], queries)


@torch.no_grad()
def similarity(queries: Tensor, items: Tensor) -> Tensor:
    """How alike every query and every item are: [queries, items].

    Embeddings [n, dim], normalised: their cosine. Tokens [n, tokens, dim], normalised: the mean over a query's tokens
    of the best cosine among the item's; a token of zeros is padding and takes no part.
    """
    if queries.ndim == 2:
        return queries @ items.T
    found = queries.new_empty(len(queries), len(items))
    for rows, some_queries in _by_length(queries):
        for columns, some_items in _by_length(items):
            found[rows[:, None], columns] = _mean_best_match(some_queries, some_items)
    return found


@torch.no_grad()
def similarity_of_pairs(queries: Tensor, items: Tensor) -> Tensor:
    """How alike each query and the item in the same place are, as `similarity` has it on its diagonal: [pairs]."""
    if queries.ndim == 2:
        return (queries * items).sum(dim=-1)
    weights, mask = _weights(queries), (items != 0).any(dim=-1)
    products = (queries @ items.mT).masked_fill_(~mask[:, None], float("-inf"))
    return (products.amax(dim=-1) * weights).sum(dim=-1)


def _weights(tokens: Tensor) -> Tensor:
    """The share of each token in the mean: [n, tokens]."""
    counts = (tokens != 0).any(dim=-1).to(tokens.dtype)
    return counts / counts.sum(dim=1, keepdim=True)


def _mean_best_match(queries: Tensor, items: Tensor) -> Tensor:
    """As MeanBestMatch, without noting which token was best: that costs as much as the products themselves."""
    weights, mask = _weights(queries), (items != 0).any(dim=-1)
    means = []
    for part in _chunks(queries, items):
        # Items first: the maximum is then over a middle axis, which is ten times faster than over a short last one.
        products = items[part].flatten(0, 1) @ queries.flatten(0, 1).T
        products.masked_fill_(~mask[part].flatten()[:, None], float("-inf"))
        best = products.view(-1, items.shape[1], *queries.shape[:2]).amax(dim=1)
        means.append((best * weights).sum(dim=-1))
    return torch.cat(means).T


def _by_length(tokens: Tensor, group: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """Groups of like length, cut to their longest, with their rows: padding is most of what captions hold."""
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    lengths, order = ((tokens != 0).any(dim=-1) * places).amax(dim=1).sort()
    for rows, own in zip(torch.split(order, group), torch.split(lengths, group), strict=True):
        yield rows, tokens[rows, : max(int(own[-1]), 1)]
