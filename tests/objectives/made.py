"""Random features and batches for the terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from declip.data.batch import Batch
from declip.model.dual_encoder import Features


def features(
    images: int = 2,
    views: Sequence[str] = ("caption", "masked", "augmented"),
    batch: int = 5,
    dim: int = 8,
    seed: int = 0,
    text_tokens: dict[str, Tensor] | None = None,
) -> Features:
    """Embeddings that ask for gradients, of lengths other than 1."""
    generator = torch.Generator().manual_seed(seed)

    def embedding(*shape: int) -> Tensor:
        return (3 * torch.randn(*shape, dim, generator=generator)).requires_grad_()

    return Features(
        image=embedding(images, batch),
        text={view: embedding(batch) for view in views},
        text_tokens=text_tokens or {},
        logit_scale=torch.tensor(7.0, requires_grad=True),
    )


def batch(sample_ids: Sequence[int] = range(5), labels: Tensor | None = None) -> Batch:
    """What the terms look at: sample ids and labels."""
    nothing = torch.empty(0)
    return Batch(nothing, nothing, (), labels, torch.tensor(list(sample_ids)))


def unit(*shape: int, seed: int = 0) -> Tensor:
    """Random directions."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def cosine(one: Tensor, other: Tensor) -> float:
    one, other = one.detach(), other.detach()
    return float(one @ other / (one.norm() * other.norm()))
