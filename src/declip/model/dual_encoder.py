"""Two towers that turn a batch of views into features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.towers import build_towers, encode_image, encode_text
from declip.recipe import Recipe

# open_clip's own mean and standard deviation, so that a finished run opens there with the same preprocessing.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Features:
    """What the towers make of a batch, in float32 whatever the towers computed in.

    image: [image views, batch, dim], not normalised
    text: by text view [batch, dim], not normalised
    masked_tokens: [batch, tokens, width], the text tower's final tokens of the masked view; None when no term asks
    logit_scale: scalar, the factor on cosine similarities (already exponentiated)
    """

    image: Tensor
    text: dict[str, Tensor]
    masked_tokens: Tensor | None
    logit_scale: Tensor

    @cached_property
    def unit_image(self) -> Tensor:
        return F.normalize(self.image.float(), dim=-1)

    def unit_texts(self, views: Sequence[str]) -> Tensor:
        """[len(views), batch, dim], normalised."""
        return torch.stack([self._unit_text[view] for view in views])

    @cached_property
    def _unit_text(self) -> dict[str, Tensor]:
        return {view: F.normalize(embedding.float(), dim=-1) for view, embedding in self.text.items()}


class DualEncoder(nn.Module):
    """open_clip's towers, run once over all image views and once over all text views."""

    mean: Tensor
    std: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.clip = build_towers(recipe.model)
        size = self.clip.visual.image_size
        self.image_size: int = size[0] if isinstance(size, tuple) else size
        self.context_length: int = self.clip.context_length
        self.logit_scale_range = recipe.model.logit_scale_range
        self.needs_tokens = "masked_language" in recipe.terms.active()
        width = self.clip.token_embedding.embedding_dim
        self.mask_embedding = nn.Parameter(torch.randn(width) * 0.02) if "masked" in recipe.text_views else None
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1) * 255, persistent=False)

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 [batch, height, width, 3] -> normalised float [batch, 3, height, width], channels last in memory.

        Floating-point images are taken as normalised already.
        """
        images = images.permute(0, 3, 1, 2)
        return images if images.is_floating_point() else (images.float() - self.mean) / self.std

    def forward(self, batch: Batch) -> Features:
        views, size = batch.images.shape[:2]
        image = encode_image(self.clip, self.pixels(batch.images.flatten(0, 1)))
        image = torch.unflatten(image, 0, (views, size))
        text, tokens = encode_text(self.clip, batch.tokens.flatten(0, 1), self.mask_embedding)
        text = torch.unflatten(text, 0, (len(batch.text_views), size))
        masked_tokens = None
        if self.needs_tokens:
            by_view = torch.unflatten(tokens, 0, (len(batch.text_views), size))
            masked_tokens = by_view[batch.text_views.index("masked")]
        return Features(
            image=image.float(),  # the terms run outside of autocast, in float32
            text=dict(zip(batch.text_views, text.float(), strict=True)),
            masked_tokens=None if masked_tokens is None else masked_tokens.float(),
            logit_scale=self.clip.logit_scale.exp(),
        )

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the logit scale (a logarithm) in the recipe's range; called after each optimizer step."""
        self.clip.logit_scale.clamp_(*self.logit_scale_range)
