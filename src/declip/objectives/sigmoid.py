"""A yes or no for every image and every text: the sigmoid loss of SigLIP (Zhai et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from declip.data.batch import Batch
from declip.model.dual_encoder import Features


def sigmoid_loss(
    images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor, chunk: int | None = None
) -> Tensor:
    """-1/batch · Σ_ij log σ(z_ij (s · I_i T_jᵀ + b)), with z_ij = 1 where i = j and -1 elsewhere (SigLIP, eq. 1).

    images, texts: [batch, dim], normalised. Published start: s = 10, b = -10.
    chunk: as many texts at once, so that memory goes with batch × chunk and not with batch²; logits are computed
        again in the backward pass. The value is the same.
    """

    def part(start: int, some: Tensor) -> Tensor:
        logits = logit_scale * images @ some.T + logit_bias
        negatives = F.softplus(logits).sum()  # -log σ(-x) = softplus(x), and -log σ(x) = softplus(x) - x
        return negatives - logits.diagonal(offset=-start).sum()

    batch = images.shape[0]
    if chunk is None or chunk >= batch:
        return part(0, texts) / batch
    losses = [
        checkpoint(part, start, texts[start : start + chunk], use_reentrant=False) for start in range(0, batch, chunk)
    ]
    return torch.stack(losses).sum() / batch


class Sigmoid(nn.Module):
    """Mean `sigmoid_loss` over the first `images` image views × the text views named.

    A pair of views is a matrix of its own: other views of the same sample are never negatives.
    """

    CHUNK = 4096

    def __init__(self, images: int, texts: Sequence[str]) -> None:
        super().__init__()
        self.images, self.texts = images, tuple(texts)

    def forward(self, features: Features, batch: Batch) -> Tensor:
        if features.logit_bias is None:
            raise ValueError("the sigmoid term needs a logit bias")
        scale, bias = features.logit_scale, features.logit_bias
        cells = [
            sigmoid_loss(image, text, scale, bias, self.CHUNK)
            for image in features.unit_image[: self.images]
            for text in features.unit_texts(self.texts)
        ]
        return torch.stack(cells).mean()
