"""A yes or no for every image and every text: the sigmoid loss of SigLIP (Zhai et al., ICCV 2023)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.chunks import chunks
from declip.model.dual_encoder import Features
from declip.objectives.cross_entropy import no_second_derivative
from declip.ranks import ALONE, Ranks


class _SigmoidLoss(torch.autograd.Function):
    """The loss and, in the same pass, its gradients: no chunk's logits are kept or made twice.

    With several ranks the texts go round in a ring, as in the paper (§3.3): each rank meets one other's at a time,
    while the next are on their way. What each rank adds to their gradients follows one place behind.
    """

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        logit_bias: Tensor,
        ranks: Ranks,
        wanted: bool,
        ids: Tensor | None,
        count: int,
    ) -> Tensor:
        loss, slopes = images.new_zeros(()), [torch.zeros_like(x) for x in (images, texts, logit_bias)]
        texts, arriving = texts.contiguous(), None
        of_ranks = None if ids is None else torch.unflatten(ranks.gather(ids, dim=1), 1, (ranks.count, -1))
        for hop in range(ranks.count):
            last = hop == ranks.count - 1
            coming = None if last else ranks.pass_on(texts)
            added = [slopes[0], torch.zeros_like(texts), slopes[2]]
            both = None if ids is None or of_ranks is None else (ids, of_ranks[:, (ranks.rank - hop) % ranks.count])
            loss += _add_block(images, texts, logit_bias, hop == 0, added if wanted else None, both)
            if arriving is not None:
                added[1] += arriving()
            if ranks.count > 1 and wanted:
                arriving = ranks.pass_on(added[1], tag=1)
            slopes[1] = added[1]
            texts = texts if coming is None else coming()
        if arriving is not None:
            slopes[1] = arriving()
        ctx.save_for_backward(*(slope.div_(count) for slope in slopes))
        return loss / count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        no_second_derivative()
        images, texts, bias = ctx.saved_tensors
        return gradient * images, gradient * texts, gradient * bias, None, None, None, None


def _add_block(
    images: Tensor,
    texts: Tensor,
    logit_bias: Tensor,
    own: bool,
    slopes: list[Tensor] | None,
    ids: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The sum of the losses of all images with all texts, a chunk at a time; adds their gradients to `slopes`.

    images: [image views, batch, dim], times the scale; texts: [text views, batch, dim]; own: text i belongs to image i;
    ids: of the images' own texts and of these, int64 [text views, batch] each: those of equal ids belong together
    """
    loss = images.new_zeros(())
    parts = chunks(images.shape[1], texts.shape[1], images)
    buffer = images.new_empty(parts[0].stop, texts.shape[1])
    for view, text_view, part in itertools.product(range(len(images)), range(len(texts)), parts):
        image, text = images[view, part], texts[text_view]
        logits = buffer[: len(image)]
        torch.addmm(logit_bias, image, text.T, out=logits)
        # -log σ(-x) = softplus(x) for the wrong texts, and -log σ(x) = softplus(x) - x for the right one
        loss += F.softplus(logits).sum()
        right = logits.diagonal(part.start)
        positive = None if ids is None else ids[0][text_view, part, None] == ids[1][text_view]
        if positive is not None:
            loss -= logits[positive].sum()
        elif own:
            loss -= right.sum()
        if slopes is not None:
            logits.sigmoid_()
            if positive is not None:
                logits -= positive.to(logits.dtype)
            elif own:
                right.sub_(1)
            slopes[0][view, part].addmm_(logits, text)
            slopes[1][text_view].addmm_(logits.T, image)
            slopes[2] += logits.sum()
    return loss


def sigmoid_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    ranks: Ranks = ALONE,
    caption_ids: Tensor | None = None,
    per: Literal["texts", "images"] = "texts",
) -> Tensor:
    """-1/batch · Σ_ij log σ(z_ij (s · I_i T_jᵀ + b)), with z_ij = 1 where i = j and -1 elsewhere (SigLIP, eq. 1).

    images, texts: [batch, dim], normalised, or [views, batch, dim]: then the mean over all pairs of views, each a
        matrix of its own. Published start: s = 10, b = -10.
    ranks: these are one rank's rows of a larger batch, whose loss is the mean of the ranks'.
    caption_ids: int64 [text views, batch]; z_ij = 1 wherever text j has the id of image i's own, so that known
        duplicates are positives too (FLAIR's multi-positive sigmoid, Xiao et al. 2025, eq. 7, has an image's own texts)
    per: texts: the mean over all pairs of views; images: summed over the text views, as FLAIR's 1 / batch would be

    Memory goes with batch and not with batch² (`model/chunks.py`). There is no second derivative.
    """
    images, texts = (x if x.ndim == 3 else x[None] for x in (images, texts))
    wanted, count = torch.is_grad_enabled(), images.shape[:2].numel() * (len(texts) if per == "texts" else 1)
    loss: Tensor = _SigmoidLoss.apply(logit_scale * images, texts, logit_bias, ranks, wanted, caption_ids, count)
    return loss


class Sigmoid(nn.Module):
    """Mean `sigmoid_loss` over the first `images` image views × the text views named.

    A pair of views is a matrix of its own: other views of the same sample are never negatives.

    equal_positives: rows that show the same caption are positives of one another, no negatives; per: as `sigmoid_loss`
    """

    def __init__(
        self,
        images: int,
        texts: Sequence[str],
        equal_positives: bool = False,
        per: Literal["texts", "images"] = "texts",
    ) -> None:
        super().__init__()
        self.images, self.texts, self.equal, self.per = images, tuple(texts), equal_positives, per

    def forward(self, features: Features, batch: Batch) -> Tensor:
        if features.logit_bias is None:
            raise ValueError("the sigmoid term needs a logit bias")
        images, texts = features.unit_image[: self.images], features.unit_texts(self.texts)
        ids = batch.ids_of(self.texts) if self.equal else None
        scale, bias = features.logit_scale, features.logit_bias
        return sigmoid_loss(images, texts, scale, bias, features.ranks, ids, self.per)
