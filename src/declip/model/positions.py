"""Position embeddings that were learnt for one image size or caption length, fitted to another."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from declip.errors import InputError


def fit_grid(positions: Tensor, shape: torch.Size) -> Tensor:
    """Position embeddings of a square grid of patches for another one, bicubic, as open_clip does.

    ``[…, places, width]`` -> shape; what stands before the grid (class token, registers) stays.
    Raises InputError where one of the two is no square grid with the same number of places before it.
    """
    here, there = positions.shape[-2], shape[-2]
    before = next((n for n in range(min(here, there)) if _is_square(here - n) and _is_square(there - n)), None)
    if before is None or positions.shape[-1] != shape[-1]:
        raise InputError(f"Position embeddings of {here} places cannot be fitted to {there}: keep the image size.")
    first, grid = positions[..., :before, :], positions[..., before:, :]
    old, new = math.isqrt(here - before), math.isqrt(there - before)
    image = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    image = F.interpolate(image, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    fitted = image.permute(0, 2, 3, 1).reshape(*shape[:-2], new * new, shape[-1]).to(positions)
    return torch.cat([first, fitted], dim=-2)


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def fit_length(positions: Tensor, length: int) -> Tensor:
    """Position embeddings ``[places, width]`` for another length of captions: the first, or all of them stretched."""
    if length <= len(positions):
        return positions[:length]
    stretched = F.interpolate(positions.T[None].float(), size=length, mode="linear", align_corners=False)
    return stretched[0].T.to(positions)
