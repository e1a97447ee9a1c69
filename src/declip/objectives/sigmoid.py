"""A yes or no for every image and every text: the sigmoid loss of SigLIP (Zhai et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.chunks import chunks
from declip.model.dual_encoder import Features
from declip.objectives.cross_entropy import no_second_derivative


class _SigmoidLoss(torch.autograd.Function):
    """The loss and, in the same pass over chunks of images, its gradients: no chunk's logits are kept or made twice."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, logit_bias: Tensor, first: int, slopes_wanted: bool) -> Tensor:
        batch, count = len(images), len(texts)
        loss = images.new_zeros(())
        slopes = [torch.empty_like(images), torch.zeros_like(texts), torch.zeros_like(logit_bias)]
        parts = chunks(batch, count, images)
        buffer = images.new_empty(parts[0].stop, count)
        for part in parts:
            logits = buffer[: part.stop - part.start]
            torch.addmm(logit_bias, images[part], texts.T, out=logits)
            right = logits.diagonal(first + part.start)
            # -log σ(-x) = softplus(x) for the wrong texts, and -log σ(x) = softplus(x) - x for the right one
            loss += F.softplus(logits).sum() - right.sum()
            if slopes_wanted:
                logits.sigmoid_()
                right.sub_(1)
                torch.mm(logits, texts, out=slopes[0][part])
                slopes[1].addmm_(logits.T, images[part])
                slopes[2] += logits.sum()
        ctx.save_for_backward(*(slope.div_(batch) for slope in slopes))
        return loss / batch

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        no_second_derivative()
        images, texts, bias = ctx.saved_tensors
        return gradient * images, gradient * texts, gradient * bias, None, None


def sigmoid_loss(images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor, first: int = 0) -> Tensor:
    """-1/batch · Σ_ij log σ(z_ij (s · I_i T_jᵀ + b)), with z_ij = 1 where i = j and -1 elsewhere (SigLIP, eq. 1).

    images, texts: [batch, dim], normalised. Published start: s = 10, b = -10.
    first: where the texts are those of a larger batch [all, dim] (that of all processes), the text of the first image.

    Memory goes with batch and not with batch² (`model/chunks.py`). There is no second derivative.
    """
    slopes_wanted = torch.is_grad_enabled()
    loss: Tensor = _SigmoidLoss.apply(logit_scale * images, texts, logit_bias, first, slopes_wanted)
    return loss


class Sigmoid(nn.Module):
    """Mean `sigmoid_loss` over the first `images` image views × the text views named.

    A pair of views is a matrix of its own: other views of the same sample are never negatives.
    """

    def __init__(self, images: int, texts: Sequence[str]) -> None:
        super().__init__()
        self.images, self.texts = images, tuple(texts)

    def forward(self, features: Features, batch: Batch) -> Tensor:
        if features.logit_bias is None:
            raise ValueError("the sigmoid term needs a logit bias")
        scale, bias = features.logit_scale, features.logit_bias
        # This rank's images against the texts of all ranks: every pair of the global batch is looked at once.
        first = features.ranks.rank * features.image.shape[1]
        cells = [
            sigmoid_loss(image, text, scale, bias, first=first)
            for image in features.unit_image[: self.images]
            for text in features.global_texts(self.texts)
        ]
        return torch.stack(cells).mean()
