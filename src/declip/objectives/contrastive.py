"""InfoNCE between views: CLIP's loss, and DeCLIP's multi-view supervision when there are several views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.dual_encoder import Features


def symmetric_cross_entropy(image_to_text: Tensor, text_to_image: Tensor) -> Tensor:
    """½ [CE(image_to_text) + CE(text_to_image)] with the diagonal as targets, mean over the rest.

    Logits [..., batch, batch], the first with a row for each image, the second with a row for each text -> [...].
    """
    losses = [
        logits.log_softmax(dim=-1).diagonal(dim1=-2, dim2=-1).mean(dim=-1) for logits in (image_to_text, text_to_image)
    ]
    return -(losses[0] + losses[1]) / 2


def multi_view_infonce(images: Tensor, texts: Tensor, logit_scale: Tensor, multi_view: float | None = None) -> Tensor:
    """Mean symmetric InfoNCE over every image view × text view (DeCLIP, eq. 5 and 6; CLIP where each is one).

    images: [image views, batch, dim] and texts: [text views, batch, dim], both normalised. Every cell of views is a
    softmax of its own, so other views of the same sample are never negatives. Returns a scalar:

        mean over v, u of  ½ [CE(s · I_v T_uᵀ) + CE(s · T_u I_vᵀ)]

    multi_view: instead of the mean over all cells, the first cell plus this times the mean of the others. The DeCLIP
        paper weighs the two apart, its public code takes the mean.
    """
    logits = logit_scale * torch.einsum("vbd,ucd->vubc", images, texts)
    cells = symmetric_cross_entropy(logits, logits.transpose(-1, -2)).flatten()
    if multi_view is None or len(cells) == 1:
        return cells.mean()
    return cells[0] + multi_view * cells[1:].mean()


class Contrastive(nn.Module):
    """`multi_view_infonce` over the first `images` image views and the text views named."""

    def __init__(self, images: int, texts: Sequence[str], multi_view: float | None = None) -> None:
        super().__init__()
        self.images, self.texts, self.multi_view = images, tuple(texts), multi_view

    def forward(self, features: Features, batch: Batch) -> Tensor:
        images, texts = features.unit_image[: self.images], features.unit_texts(self.texts)
        return multi_view_infonce(images, texts, features.logit_scale, self.multi_view)
