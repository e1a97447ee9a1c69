"""InfoNCE between views: CLIP's loss, and DeCLIP's multi-view supervision when there are several views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.dual_encoder import Features
from declip.model.mixing import of_partners
from declip.objectives.cross_entropy import cross_entropy, cross_entropy_both_ways

# Logits of a cell, up to which all cells as whole matrices are faster than in chunks: fewer, larger operations.
WHOLE = 2**19


def symmetric_cross_entropy(image_to_text: Tensor, text_to_image: Tensor, first: int = 0) -> Tensor:
    """½ [CE(image_to_text) + CE(text_to_image)] with the diagonal as targets, mean over the rest.

    Logits [..., batch, all], the first with a row for each image, the second with a row for each text -> [...].
    first: the column that belongs to the first row.
    """

    def right(logits: Tensor) -> Tensor:
        return logits.log_softmax(dim=-1).diagonal(first, dim1=-2, dim2=-1).mean(dim=-1)

    return -(right(image_to_text) + right(text_to_image)) / 2


def multi_view_infonce(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    multi_view: float | None = None,
    caption_ids: Tensor | None = None,
    candidates: tuple[Tensor, Tensor] | None = None,
    first: int = 0,
    own_share: float = 1.0,
) -> Tensor:
    """Mean symmetric InfoNCE over every image view × text view (DeCLIP, eq. 5 and 6; CLIP where each is one).

    images: [image views, batch, dim] and texts: [text views, batch, dim], both normalised. Every cell of views is a
    softmax of its own, so other views of the same sample are never negatives. Returns a scalar:

        mean over v, u of  ½ [CE(s · I_v T_uᵀ) + CE(s · T_u I_vᵀ)]

    Memory goes with batch and not with batch²: more than WHOLE logits are made in chunks (`cross_entropy.py`), of which
    there is no second derivative.

    multi_view: instead of the mean over all cells, the first cell plus this times the mean of the others. The DeCLIP
        paper weighs the two apart, its public code takes the mean.
    caption_ids: int64 [text views, batch]; rows of equal ids are one another's positives, in equal parts, as in
        supervised contrastive learning (Khosla et al. 2020, arXiv:2004.11362, eq. 2) and UniCL (Yang et al. 2022,
        arXiv:2204.03610), with the caption in the place of the class.
    candidates: images and texts of a larger batch, [views, all, dim] each, in which the rows stand from `first` on (the
        batches of all processes); by default the rows themselves. `caption_ids` are then [text views, all].
    own_share: of each image that is its own; the rest is its partner's (`model/mixing.py`), whose text is its positive
        to the same share
    """
    batch, scaled = images.shape[1], logit_scale * images
    all_images, all_texts = (images, texts) if candidates is None else candidates
    if batch * all_texts.shape[1] <= WHOLE:
        losses = _whole_cells(images, texts, logit_scale, candidates, first)
    elif candidates is None:
        losses = torch.stack([cross_entropy_both_ways(image, text) for image in scaled for text in texts])
    else:
        right = torch.arange(first, first + batch, device=images.device)
        there = [cross_entropy(image, text, right) for image in scaled for text in all_texts]
        back = [cross_entropy(logit_scale * text, image, right) for image in all_images for text in texts]
        losses = (torch.stack(there) + torch.stack(back)) / 2
    if caption_ids is not None or own_share != 1:
        # Shared targets are Σ_ij e_ij s · I_i T_j, where e sums to one over each i and each j: one sum for both ways.
        wanted = texts if caption_ids is None else mean_of_equals(all_texts, caption_ids)[:, first : first + batch]
        if own_share != 1:
            wanted = own_share * wanted + (1 - own_share) * of_partners(wanted, dim=1)
        losses = losses + (scaled[:, None] * (texts - wanted)).sum(dim=(-2, -1)).flatten() / batch
    if multi_view is None or len(losses) == 1:
        return losses.mean()
    return losses[0] + multi_view * losses[1:].mean()


def _whole_cells(
    images: Tensor, texts: Tensor, logit_scale: Tensor, candidates: tuple[Tensor, Tensor] | None, first: int
) -> Tensor:
    """All cells' losses at once, from their whole matrices: [image views · text views]."""
    with torch.autocast(images.device.type, enabled=False):  # as in chunks
        if candidates is None:
            image_to_text = logit_scale * torch.einsum("vbd,ucd->vubc", images, texts)
            text_to_image = image_to_text.transpose(-1, -2)
        else:
            image_to_text = logit_scale * torch.einsum("vbd,ucd->vubc", images, candidates[1])
            text_to_image = logit_scale * torch.einsum("ubd,vcd->vubc", texts, candidates[0])
        return symmetric_cross_entropy(image_to_text, text_to_image, first).flatten()


def mean_of_equals(vectors: Tensor, ids: Tensor) -> Tensor:
    """In place of each row the mean of all rows of its id: [views, all, dim] and int64 [views, all]."""
    ordered = ids.sort(dim=-1).values
    groups = torch.searchsorted(ordered, ids)  # an id's first place among all, without waiting for how many there are
    counts = torch.searchsorted(ordered, ids, right=True) - groups
    groups = groups[..., None].expand_as(vectors)
    return torch.zeros_like(vectors).scatter_add(1, groups, vectors).gather(1, groups) / counts[..., None]


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
        ranks, ids, candidates = features.ranks, None, None
        if self.equal and (own := batch.ids_of(self.texts)) is not None:
            ids = ranks.gather(own, dim=1)
        if ranks.count > 1:
            # This rank's rows against the columns of all ranks, both ways: the work is shared, not repeated.
            candidates = ranks.gather(images, dim=1), features.global_texts(self.texts)
        first = ranks.rank * images.shape[1]
        own_share = 1.0 if batch.own_share is None else batch.own_share
        scale = features.logit_scale
        return multi_view_infonce(images, texts, scale, self.multi_view, ids, candidates, first, own_share)
