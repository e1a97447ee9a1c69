"""A yes or no for every image and every text: the sigmoid loss of SigLIP (Zhai et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.dual_encoder import Features


class _SigmoidLoss(torch.autograd.Function):
    """The loss and, in the same pass over chunks of texts, its gradients: no chunk's logits are kept or made twice."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor, chunk: int, first: int
    ) -> Tensor:
        loss = images.new_zeros(())
        gradients = [torch.zeros_like(x) for x in (images, texts, logit_scale, logit_bias)]
        for start in range(0, len(texts), chunk):
            some = texts[start : start + chunk]
            similarity = images @ some.T
            logits = logit_scale * similarity + logit_bias
            # -log σ(-x) = softplus(x) for the wrong texts, and -log σ(x) = softplus(x) - x for the right one
            loss += F.softplus(logits).sum() - logits.diagonal(offset=first - start).sum()
            if not any(ctx.needs_input_grad):
                continue
            slope = logits.sigmoid_()
            slope.diagonal(offset=first - start).sub_(1)
            gradients[0].addmm_(slope, some)
            gradients[1][start : start + chunk] = slope.T @ images
            gradients[2] += (slope * similarity).sum()
            gradients[3] += slope.sum()
        ctx.save_for_backward(logit_scale, *gradients)
        ctx.batch = len(images)
        return loss / len(images)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logit_scale, images, texts, scale, bias = ctx.saved_tensors
        gradient = gradient / ctx.batch
        towers = gradient * logit_scale * images, gradient * logit_scale * texts
        return *towers, gradient * scale, gradient * bias, None, None


def sigmoid_loss(
    images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor, chunk: int = 4096, first: int = 0
) -> Tensor:
    """-1/batch · Σ_ij log σ(z_ij (s · I_i T_jᵀ + b)), with z_ij = 1 where i = j and -1 elsewhere (SigLIP, eq. 1).

    images, texts: [batch, dim], normalised. Published start: s = 10, b = -10.
    chunk: as many texts at once: memory goes with batch × chunk and not with batch². The value is the same.
    first: where the texts are those of a larger batch [all, dim] (that of all processes), the text of the first image.
    """
    with torch.autocast(images.device.type, enabled=False):  # its own gradients need one precision throughout
        loss: Tensor = _SigmoidLoss.apply(images, texts.to(images.dtype), logit_scale, logit_bias, chunk, first)
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
