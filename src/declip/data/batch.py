"""What the loader hands to the training step: tensors and sample ids."""

from __future__ import annotations

from collections.abc import Sequence
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
    caption_ids: int64 [text views, batch], equal where two rows show the same caption, or are pairs that have the same
        ones (`data.text.equal`); None where no term asks
    draws: float32 [image views, batch, numbers], where `images` are only crops: what `finish_views` is to do to them.
        It stays on the CPU, where that is planned. None where the views are whole
    kept_images: float16 [image views, batch, …], what the resting part of the image tower gives for each view;
        `images` then have no pixels
    kept_texts: float16 [text views, batch, width] likewise, and `tokens` have no places; or, where only the last
        layers of the text tower learn, [text views, batch, tokens, width]
    filters: float32 [image views, batch, 3 out, 3 in, side, side], what each image is convolved with once it is
        normalised (`data.images.convolve`); else None
    own_share: with `data.mix`, share of each image that is its own in the mixture with its partner's; else None
    teacher_images: float32 [batch, width], a teacher's embedding of each image; NaN where it has none
    teacher_texts: float32 [batch, width], that of the caption view
    local_images: uint8 [small crops, batch, height, width, 3]; None where no term asks
    """

    images: Tensor
    tokens: Tensor
    text_views: tuple[str, ...]
    labels: Tensor | None
    sample_ids: Tensor
    broken: tuple[tuple[int, str, str], ...] = ()
    caption_ids: Tensor | None = None
    draws: Tensor | None = None
    kept_images: Tensor | None = None
    kept_texts: Tensor | None = None
    filters: Tensor | None = None
    own_share: float | None = None
    teacher_images: Tensor | None = None
    teacher_texts: Tensor | None = None
    local_images: Tensor | None = None

    def part(self, images: int, views: Sequence[str]) -> Batch:
        """The first image views and some of the text views alone, as a model that only embeds takes them."""
        places = [self.text_views.index(view) for view in views]
        kept = self.kept_images, self.kept_texts
        return replace(
            self,
            images=self.images[:images],
            tokens=self.tokens[places] if self.kept_texts is None or self.tokens.shape[2] else self.tokens,
            text_views=tuple(views),
            kept_images=None if kept[0] is None else kept[0][:images],
            filters=None if self.filters is None else self.filters[:images],
            kept_texts=None if kept[1] is None else kept[1][places],
            local_images=None,
        )

    def ids_of(self, views: Sequence[str]) -> Tensor | None:
        """`caption_ids` of these text views: int64 [len(views), batch]."""
        if self.caption_ids is None:
            return None
        return self.caption_ids[[self.text_views.index(view) for view in views]]

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and name != "draws"}
        sent: dict[str, Any] = {name: send(value, device) for name, value in tensors.items()}
        return replace(self, **sent)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting for the device where that is safe."""
    # CUDA puts the numbers aside before it returns. MPS reads them later, when their memory may be somebody else's
    # (https://github.com/pytorch/pytorch/issues/189690).
    return tensor.to(device, non_blocking=device.type == "cuda")
