"""Batch norm over the rows of all ranks. PyTorch's own SyncBatchNorm does not run on CPUs."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.model.recompute import BatchNorm
from declip.ranks import Ranks, all_gather


class _Normalise(torch.autograd.Function):
    """Batch norm with the mean and variance of all ranks, [batch, channels, ...]; also returns the two, [channels]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor]:
        # PyTorch's own kernels read x once; var_mean over several dimensions takes many times as long on CPUs. The two
        # running averages are thrown away: they say that statistics of half precision are wanted in full.
        unused = torch.zeros_like(weight), torch.ones_like(weight)
        local = torch.stack(torch.batch_norm_update_stats(x, *unused, 0.0))
        found = local.new_empty(ranks.count * 2, x.shape[1])
        all_gather(found, local)
        means, variances = found.view(ranks.count, 2, -1).unbind(1)
        # Ranks have equally many rows. This form loses no digits where the mean is large.
        mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.ranks, ctx.elements = eps, ranks, ranks.count * x.numel() / x.shape[1]
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        scale, gradient = (var + ctx.eps).rsqrt(), gradients[0]
        wanted = [False, True, True]
        _, weight_gradient, bias_gradient = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, scale, True, ctx.eps, wanted
        )
        sums = ctx.ranks.sum(torch.stack([weight_gradient, bias_gradient]))
        # With n the normalised x: scale · weight · (gradient − mean(gradient · n) · n − mean(gradient)). The kernel of
        # the forward pass computes all but the first.
        scale = scale * weight
        of_normal, of_all = -scale * sums / ctx.elements
        x_gradient = F.batch_norm(x, mean, var, of_normal, of_all, training=False, eps=ctx.eps)
        x_gradient.addcmul_(gradient, scale.view([1, -1] + [1] * (x.ndim - 2)))
        return x_gradient, weight_gradient, bias_gradient, None, None


def synchronise(module: nn.Module, ranks: Ranks) -> None:
    """Make every batch norm in the module take its mean and variance from all ranks' rows while it trains.

    Parameters, buffers and their names stay. Gradients are exact where the ranks' are averaged (`declip.ranks`).
    """
    for part in module.modules():
        if isinstance(part, BatchNorm):
            # On the instance: the class, with what else it does (timm's fuse an activation), stays as it is.
            part.forward = functools.partial(_forward, part, ranks)  # type: ignore[method-assign]


def _forward(norm: Any, ranks: Ranks, x: Tensor) -> Tensor:
    if not norm.training:
        return type(norm).forward(norm, x)  # type: ignore[no-any-return]
    y, mean, var = _Normalise.apply(x, norm.weight, norm.bias, norm.eps, ranks)
    elements = ranks.count * x.numel() / x.shape[1]
    with torch.no_grad():
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_((var * elements / (elements - 1)).to(norm.running_var.dtype), norm.momentum)
        norm.num_batches_tracked += 1
    for after in ("drop", "act"):  # of timm's BatchNormAct2d
        y = getattr(norm, after)(y) if hasattr(norm, after) else y
    return y  # type: ignore[no-any-return]
