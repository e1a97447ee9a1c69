"""InfoNCE between views: CLIP's loss, and DeCLIP's multi-view supervision when there are several views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.dual_encoder import Features


def multi_view_infonce(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Mean symmetric InfoNCE over every image view × text view (DeCLIP, eq. 5 and 6; CLIP where each is one).

    images: [image views, batch, dim] and texts: [text views, batch, dim], both normalised. Every cell of views is a
    softmax of its own, so other views of the same sample are never negatives. Returns a scalar.
    """
    logits = logit_scale * torch.einsum("vbd,ucd->vubc", images, texts)
    matching = logits.diagonal(dim1=-2, dim2=-1)
    image_to_text = logits.logsumexp(dim=-1) - matching
    text_to_image = logits.logsumexp(dim=-2) - matching
    return (image_to_text.mean() + text_to_image.mean()) / 2


class Contrastive(nn.Module):
    """`multi_view_infonce` over the first `images` image views and the text views named."""

    def __init__(self, images: int, texts: Sequence[str]) -> None:
        super().__init__()
        self.images, self.texts = images, tuple(texts)

    def forward(self, features: Features, batch: Batch) -> Tensor:
        return multi_view_infonce(
            features.unit_image[: self.images], features.unit_texts(self.texts), features.logit_scale
        )
