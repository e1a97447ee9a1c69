"""Cross-entropy of the products of many rows and columns, without ever holding their matrix.

Only chunks of rows exist at a time (`model/chunks.py`), forward and backward. Where a row or a column is a softmax, its
largest logit and its sum are kept apart: their difference to the positive's logit loses no digits, and p = exp(x - max)
/ sum none either. Products are written into what is there, so autocast does not touch them. None of this has a second
derivative: asking for one with `create_graph` raises RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from declip.model.chunks import chunks


def no_second_derivative() -> None:
    """To be called in backward: its own results know nothing of where they come from.

    Raises RuntimeError where autograd would take them for constants.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("this loss has no second derivative: create_graph cannot be used")


class _BothWays(torch.autograd.Function):
    """One product forward; backward makes it again for both softmaxes, and one product for each gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor) -> Tensor:
        batch = len(images)
        own, row_tops, row_sums = (images.new_empty(batch) for _ in range(3))
        tops, sums = torch.full_like(own, float("-inf")), torch.zeros_like(own)  # of the columns
        parts = chunks(batch, batch, images)
        buffers = images.new_empty(2, parts[0].stop, batch)
        for part in parts:
            logits, shares = buffers[:, : part.stop - part.start]
            torch.mm(images[part], texts.T, out=logits)
            own[part] = logits.diagonal(part.start)
            row_tops[part] = logits.amax(dim=1)
            row_sums[part] = torch.sub(logits, row_tops[part, None], out=shares).exp_().sum(dim=1)
            higher = torch.maximum(tops, logits.amax(dim=0))
            sums = sums * (tops - higher).exp() + logits.sub_(higher).exp_().sum(dim=0)
            tops = higher
        ctx.save_for_backward(images, texts, row_tops, row_sums, tops, sums)
        return ((row_tops - own) + row_sums.log() + (tops - own) + sums.log()).mean() / 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        no_second_derivative()
        images, texts, row_tops, row_sums, tops, sums = ctx.saved_tensors
        batch = len(images)
        row_weights, weights = 0.5 / batch / row_sums, 0.5 / batch / sums
        image_slopes, text_slopes = torch.empty_like(images), torch.zeros_like(texts)
        parts = chunks(batch, batch, images)
        buffers = images.new_empty(2, parts[0].stop, batch)
        for part in parts:
            slopes, shares = buffers[:, : part.stop - part.start]
            torch.mm(images[part], texts.T, out=slopes)
            torch.sub(slopes, row_tops[part, None], out=shares).exp_().mul_(row_weights[part, None])
            slopes.sub_(tops).exp_().mul_(weights).add_(shares)
            slopes.diagonal(part.start).sub_(1 / batch)
            torch.mm(slopes, texts, out=image_slopes[part])
            text_slopes.addmm_(slopes.T, images[part])
        return image_slopes.mul_(gradient), text_slopes.mul_(gradient)


class _OneWay(torch.autograd.Function):
    """A row's softmax is whole within its chunk, so the gradients are made in the same pass: no product twice."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        targets: Tensor,
        weights: Tensor,
        bias: Tensor | None,
        hide: Callable[[Tensor, slice], object] | None,
        slopes_wanted: tuple[bool, bool, bool],
    ) -> Tensor:
        losses = torch.empty_like(weights)
        row_slopes = torch.empty_like(rows) if slopes_wanted[0] else None
        column_slopes = torch.zeros_like(columns) if slopes_wanted[1] else None
        bias_slopes = torch.zeros_like(bias) if bias is not None and slopes_wanted[2] else None
        parts = chunks(len(rows), len(columns), rows)
        buffer = rows.new_empty(parts[0].stop, len(columns))
        for part in parts:
            logits, target, weight = buffer[: part.stop - part.start], targets[part, None], weights[part, None]
            torch.mm(rows[part], columns.T, out=logits)
            if bias is not None:
                logits += bias
            if hide is not None:
                hide(logits, part)
            top, own = logits.amax(dim=1, keepdim=True), logits.gather(1, target)
            shares = logits.sub_(top).exp_()
            sums = shares.sum(dim=1, keepdim=True)
            losses[part] = ((top - own) + sums.log())[:, 0]
            slopes = shares.mul_(weight / sums).scatter_add_(1, target, -weight)
            if row_slopes is not None:
                torch.mm(slopes, columns, out=row_slopes[part])
            if column_slopes is not None:
                column_slopes.addmm_(slopes.T, rows[part])
            if bias_slopes is not None:
                bias_slopes += slopes.sum(dim=0)
        ctx.save_for_backward(row_slopes, column_slopes, bias_slopes)
        return (losses * weights).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        no_second_derivative()
        rows, columns, bias = (None if found is None else gradient * found for found in ctx.saved_tensors)
        return rows, columns, None, None, bias, None, None


def cross_entropy_both_ways(images: Tensor, texts: Tensor) -> Tensor:
    """½ [CE(I Tᵀ) + CE(T Iᵀ)], the diagonal being right, mean over the rows: [batch, dim] each -> a scalar.

    One of the two carries the logit scale.
    """
    loss: Tensor = _BothWays.apply(images, texts)
    return loss


def cross_entropy(
    rows: Tensor,
    columns: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    hide: Callable[[Tensor, slice], object] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Σ_i w_i · CE(rows_i columnsᵀ + bias, targets_i): [batch, dim] and [all, dim] -> a scalar.

    One of the two carries the logit scale.

    targets: int64 [batch], which column is right for each row; weights: [batch], by default 1 / batch each.
    hide: given some rows' logits [some, all] and which rows those are, it sets what is no candidate to -∞.
    bias: [all], by default none
    """
    if weights is None:
        weights = rows.new_full((len(rows),), 1 / len(rows))
    given = (rows, columns, bias)
    slopes_wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in given)
    loss: Tensor = _OneWay.apply(rows, columns, targets, weights, bias, hide, slopes_wanted)
    return loss
