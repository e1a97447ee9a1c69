"""Pictures mixed with those of other pairs (mixup): what lies between few pairs is not so easily learnt by heart."""

from __future__ import annotations

import torch
from torch import Tensor


def of_partners(rows: Tensor, dim: int = 0) -> Tensor:
    """Each row's partner in its place: the first and the second are partners, the third and the fourth, …

    The number of rows is even, so each partner's partner is the row itself.
    """
    return torch.unflatten(rows, dim, (-1, 2)).flip(dim + 1).flatten(dim, dim + 1)


def mixed(images: Tensor, share: float) -> Tensor:
    """`share` of each row's own and the rest of its partner's (Zhang et al. 2018, arXiv:1710.09412, eq. 1).

    images: [image views, batch, …], pixels or states of a tower (Verma et al. 2019, arXiv:1806.05236); all views of a
    row are mixed with the same partner's.
    """
    images = images.float()
    return share * images + (1 - share) * of_partners(images, dim=1)
