"""What the loader hands to the training step: tensors and sample ids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One step's views.

    images: uint8 [image views, batch, height, width, 3]
    tokens: int64 [text views, batch, tokens], padded with 0 to the longest caption of the batch
    text_views: the names of the text views, in the order of `tokens`
    labels: int64 [batch, tokens], the hidden tokens of the masked view, -100 elsewhere; None without a masked view
    sample_ids: int64 [batch], which pair each row is
    broken: the pairs that could not be read and were replaced, as (id, where, reason)
    caption_ids: int64 [text views, batch], equal where two rows show the same caption; None where no term asks
    """

    images: Tensor
    tokens: Tensor
    text_views: tuple[str, ...]
    labels: Tensor | None
    sample_ids: Tensor
    broken: tuple[tuple[int, str, str], ...] = ()
    caption_ids: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        tensors: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})
