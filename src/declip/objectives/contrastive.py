"""InfoNCE between views: CLIP's loss, and DeCLIP's multi-view supervision when there are several views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.dual_encoder import Features


def symmetric_cross_entropy(
    image_to_text: Tensor, text_to_image: Tensor, targets: Tensor | None = None, first: int = 0
) -> Tensor:
    """½ [CE(image_to_text) + CE(text_to_image)] with the diagonal as targets, mean over the rest.

    Logits [..., batch, all], the first with a row for each image, the second with a row for each text -> [...].
    targets: [..., batch, all], instead of the diagonal; each row sums to 1.
    first: the column that belongs to the first row.
    """

    def right(logits: Tensor) -> Tensor:
        log_shares = logits.log_softmax(dim=-1)
        if targets is None:
            return log_shares.diagonal(first, dim1=-2, dim2=-1)
        return (targets * log_shares).sum(dim=-1)

    return -(right(image_to_text).mean(dim=-1) + right(text_to_image).mean(dim=-1)) / 2


def equal_targets(ids: Tensor, candidates: Tensor | None = None) -> Tensor:
    """Rows of equal ids are one another's positives, in equal parts: [..., batch] -> [..., batch, batch].

    candidates: [..., all], the ids of the columns, where those are more than the rows.

    As in supervised contrastive learning (Khosla et al. 2020, arXiv:2004.11362, eq. 2) and UniCL (Yang et al. 2022,
    arXiv:2204.03610), with the caption in the place of the class.
    """
    equal = (ids.unsqueeze(-1) == (ids if candidates is None else candidates).unsqueeze(-2)).float()
    return equal / equal.sum(dim=-1, keepdim=True)


def multi_view_infonce(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    multi_view: float | None = None,
    targets: Tensor | None = None,
    candidates: tuple[Tensor, Tensor] | None = None,
    first: int = 0,
) -> Tensor:
    """Mean symmetric InfoNCE over every image view × text view (DeCLIP, eq. 5 and 6; CLIP where each is one).

    images: [image views, batch, dim] and texts: [text views, batch, dim], both normalised. Every cell of views is a
    softmax of its own, so other views of the same sample are never negatives. Returns a scalar:

        mean over v, u of  ½ [CE(s · I_v T_uᵀ) + CE(s · T_u I_vᵀ)]

    multi_view: instead of the mean over all cells, the first cell plus this times the mean of the others. The DeCLIP
        paper weighs the two apart, its public code takes the mean.
    targets: [text views, batch, batch], what each row should find instead of itself alone (`equal_targets`).
    candidates: images and texts of a larger batch, [views, all, dim] each, in which the rows stand from `first` on (the
        batches of all processes); by default the rows themselves. `targets` are then [text views, batch, all].
    """
    if candidates is None:
        image_to_text = logit_scale * torch.einsum("vbd,ucd->vubc", images, texts)
        text_to_image = image_to_text.transpose(-1, -2)
    else:
        image_to_text = logit_scale * torch.einsum("vbd,ucd->vubc", images, candidates[1])
        text_to_image = logit_scale * torch.einsum("ubd,vcd->vubc", texts, candidates[0])
    cells = symmetric_cross_entropy(image_to_text, text_to_image, targets, first).flatten()
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
        ranks, targets, candidates = features.ranks, None, None
        if self.equal and batch.caption_ids is not None:
            ids = batch.caption_ids[[batch.text_views.index(view) for view in self.texts]]
            targets = equal_targets(ids, ranks.gather(ids, dim=1))
        if ranks.count > 1:
            # This rank's rows against the columns of all ranks, both ways: the work is shared, not repeated.
            candidates = ranks.gather(images, dim=1), features.global_texts(self.texts)
        first = ranks.rank * images.shape[1]
        scale = features.logit_scale
        return multi_view_infonce(images, texts, scale, self.multi_view, targets, candidates, first)
