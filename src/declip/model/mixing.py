"""Pictures mixed with those of other pairs (mixup) or with what a random convolution makes of them (RandConv).

What lies between few pairs, and textures that never come again, are not so easily learnt by heart.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from declip.data.device_views import in_parts


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


def convolved(images: Tensor, filters: Tensor) -> Tensor:
    """Each image convolved with its own filter; what is outside of it is 0, the mean colour.

    images: float [..., height, width, 3], normalised; filters: float32 [..., 3 out, 3 in, side, side]. Returns float32
    [..., height, width, 3]; also under autocast, so that a filter that changes nothing changes nothing.
    """
    with torch.autocast(images.device.type, enabled=False):
        return in_parts(_convolved, images.float(), filters.flatten(0, -5))


def _convolved(images: Tensor, filters: Tensor) -> Tensor:
    """[batch, height, width, 3] and [batch, 3, 3, side, side]"""
    batch, height, width, _ = images.shape
    planes = images.permute(0, 3, 1, 2).reshape(1, batch * 3, height, width)
    made = functional.conv2d(planes, filters.flatten(0, 1), padding=filters.shape[-1] // 2, groups=batch)
    return made.view(batch, 3, height, width).permute(0, 2, 3, 1).contiguous()
