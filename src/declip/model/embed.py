"""From towers to what is compared: normalised embeddings, or normalised tokens where a model compares those."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from declip.model.heads import TokenMappings
from declip.model.image_tower import encode_image
from declip.model.text_tower import caption_mask, encode_text, trim_for
from declip.model.towers import Towers


class TokenWise(NamedTuple):
    """How a model that compares tokens does it: its mappings, whether padding takes no part, and the logit scale."""

    mappings: TokenMappings
    mask_padding: bool
    logit_scale: Tensor | None = None


def embed_images(clip: Towers, pixels: Tensor, token_wise: TokenWise | None = None) -> Tensor:
    """float [batch, 3, height, width] -> float32 [batch, dim] or [batch, tokens, dim], normalised."""
    encoded = encode_image(clip, pixels)
    if token_wise is None:
        return F.normalize(encoded.embedding.float(), dim=-1)
    if encoded.tokens is None:
        raise ValueError("this image tower gives no tokens")
    return token_wise.mappings.map_image(encoded.tokens.float())


def embed_texts(clip: Towers, tokens: Tensor, pad: int = 0, token_wise: TokenWise | None = None) -> Tensor:
    """int64 [batch, context length], padded -> float32 [batch, dim] or [batch, context length, dim], normalised.

    Tokens of padding are zeros where they take no part.
    """
    if token_wise is not None and not token_wise.mask_padding:
        return token_wise.mappings.map_text(encode_text(clip, tokens, whole=True).tokens.float())
    cut = trim_for(clip, tokens, pad)
    if token_wise is None:
        return F.normalize(encode_text(clip, cut).embedding.float(), dim=-1)
    mapped = token_wise.mappings.map_text(encode_text(clip, cut).tokens.float()) * caption_mask(cut, pad)[..., None]
    return F.pad(mapped, (0, 0, 0, tokens.shape[1] - cut.shape[1]))
