"""InfoNCE between views: CLIP's loss, and DeCLIP's multi-view supervision when there are several views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.dual_encoder import Features


def symmetric_cross_entropy(image_to_text: Tensor, text_to_image: Tensor, targets: Tensor | None = None) -> Tensor:
    """½ [CE(image_to_text) + CE(text_to_image)] with the diagonal as targets, mean over the rest.

    Logits [..., batch, batch], the first with a row for each image, the second with a row for each text -> [...].
    targets: [..., batch, batch], instead of the diagonal; symmetric, each row sums to 1.
    """

    def right(logits: Tensor) -> Tensor:
        log_shares = logits.log_softmax(dim=-1)
        if targets is None:
            return log_shares.diagonal(dim1=-2, dim2=-1)
        return (targets * log_shares).sum(dim=-1)

    return -(right(image_to_text).mean(dim=-1) + right(text_to_image).mean(dim=-1)) / 2


def equal_targets(ids: Tensor) -> Tensor:
    """Rows of equal ids are one another's positives, in equal parts: [..., batch] -> [..., batch, batch].

    As in supervised contrastive learning (Khosla et al. 2020, arXiv:2004.11362, eq. 2) and UniCL (Yang et al. 2022,
    arXiv:2204.03610), with the caption in the place of the class.
    """
    equal = (ids.unsqueeze(-1) == ids.unsqueeze(-2)).float()
    return equal / equal.sum(dim=-1, keepdim=True)


def multi_view_infonce(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    multi_view: float | None = None,
    targets: Tensor | None = None,
) -> Tensor:
    """Mean symmetric InfoNCE over every image view × text view (DeCLIP, eq. 5 and 6; CLIP where each is one).

    images: [image views, batch, dim] and texts: [text views, batch, dim], both normalised. Every cell of views is a
    softmax of its own, so other views of the same sample are never negatives. Returns a scalar:

        mean over v, u of  ½ [CE(s · I_v T_uᵀ) + CE(s · T_u I_vᵀ)]

    multi_view: instead of the mean over all cells, the first cell plus this times the mean of the others. The DeCLIP
        paper weighs the two apart, its public code takes the mean.
    targets: [text views, batch, batch], what each row should find instead of itself alone (`equal_targets`).
    """
    logits = logit_scale * torch.einsum("vbd,ucd->vubc", images, texts)
    cells = symmetric_cross_entropy(logits, logits.transpose(-1, -2), targets).flatten()
    if multi_view is None or len(cells) == 1:
        return cells.mean()
    return cells[0] + multi_view * cells[1:].mean()


class Contrastive(nn.Module):
    """`multi_view_infonce` over the first `images` image views and the text views named.

    equal_positives: rows that show the same caption are positives of one another, no negatives.
    """

    def __init__(
        self, images: int, texts: Sequence[str], multi_view: float | None = None, equal_positives: bool = False
    ) -> None:
        super().__init__()
        self.images, self.texts, self.multi_view, self.equal = images, tuple(texts), multi_view, equal_positives

    def forward(self, features: Features, batch: Batch) -> Tensor:
        images, texts = features.unit_image[: self.images], features.unit_texts(self.texts)
        targets = None
        if self.equal and batch.caption_ids is not None:
            targets = equal_targets(batch.caption_ids[[batch.text_views.index(view) for view in self.texts]])
        return multi_view_infonce(images, texts, features.logit_scale, self.multi_view, targets)
