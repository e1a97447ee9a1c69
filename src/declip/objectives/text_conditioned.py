"""Each text pools the patches that it speaks of: FLAIR's text-conditioned sigmoid loss (Xiao et al., CVPR 2025)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from declip.data.batch import Batch
from declip.model.chunks import chunks
from declip.model.dual_encoder import Features
from declip.model.heads import TextPooler


def choose_texts(image_ids: Tensor, text_ids: Tensor, views: int) -> Tensor:
    """Which of an image's `views` texts each other image meets: int64 [images, texts].

    By a hash of both sample ids and of the batch: another choice in every batch, and the same however many processes
    share it.
    """
    salt = (text_ids * text_ids).sum() + 1
    mixed = (image_ids[:, None] * 2654435761 + text_ids[None] * 40503 + salt * 97) & 0x7FFFFFFF
    mixed = ((mixed >> 15) ^ mixed) * 739 & 0x7FFFFFFF
    return (mixed >> 7) % views


def text_conditioned_sigmoid(
    pooler: TextPooler,
    patches: Tensor,
    texts: Tensor,
    choice: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    first: int = 0,
) -> Tensor:
    """-1 / (texts + views - 1) · Σ_i Σ_c log σ(z (s · p(i, c) · c + b)), z = 1 where c is image i's (FLAIR, eq. 5).

    p(i, c) is what text c pools of image i's patches. An image meets all of its own texts and one of every other's, and
    what a text has pooled is compared with that text alone, right or wrong: nothing can be told from the texts alone.

    patches: [images, patches, width]; texts: [views, texts, dim], normalised; choice: int64 [images, texts], which text
    of each other image is met; first: the column of the first image's own texts. Images go through in chunks, computed
    again in the backward pass where there are several.
    """
    views, count = texts.shape[:2]
    parts = chunks(len(patches), (count + views) * (texts.shape[-1] + patches.shape[1]), texts)

    def loss_of(patches: Tensor, texts: Tensor, choice: Tensor, own: Tensor) -> Tensor:
        met = texts.transpose(0, 1)[torch.arange(count, device=own.device), choice]  # [some, texts, dim]
        asked = torch.cat([texts[:, own].transpose(0, 1), met], dim=1)
        logits = logit_scale * (pooler(patches, asked) * asked).sum(dim=-1) + logit_bias
        wrong = F.softplus(logits[:, views:]).scatter(1, own[:, None], 0.0)  # its own are among the others once more
        return F.softplus(-logits[:, :views]).sum() + wrong.sum()

    total = patches.new_zeros(())
    for part in parts:
        own = torch.arange(first + part.start, first + part.stop, device=patches.device)
        given = patches[part], texts, choice[part], own
        total = total + (loss_of(*given) if len(parts) == 1 else checkpoint(loss_of, *given, use_reentrant=False))
    return total / (count + views - 1)


class TextConditioned(nn.Module):
    """`text_conditioned_sigmoid` between the first image view's patches and the text views named.

    Shares the model's logit scale and bias with the sigmoid term.
    """

    def __init__(self, pooler: TextPooler, texts: Sequence[str]) -> None:
        super().__init__()
        self.pooler, self.texts = pooler, tuple(texts)

    def forward(self, features: Features, batch: Batch) -> Tensor:
        if features.image_tokens is None or features.logit_bias is None:
            raise ValueError("the text-conditioned term needs the image tower's tokens and a logit bias")
        ranks, texts = features.ranks, features.global_texts(self.texts)
        choice = choose_texts(batch.sample_ids, ranks.gather(batch.sample_ids), len(self.texts))
        first = ranks.rank * len(batch.sample_ids)
        scale, bias = features.logit_scale, features.logit_bias
        loss = text_conditioned_sigmoid(self.pooler, features.image_tokens[0], texts, choice, scale, bias, first)
        return ranks.count * loss  # the mean of the ranks' is then the sum over all images
