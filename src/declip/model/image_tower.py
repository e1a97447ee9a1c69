"""What an image tower makes of pixels: the embedding, the feature before its projection, and tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.model.towers import Towers

if TYPE_CHECKING:
    from open_clip.modified_resnet import AttentionPool2d
    from open_clip.timm_model import TimmModel

IMAGES_AT_ONCE = 64
"""Images that go through a tower together where no gradient is wanted: more go slower on a CPU, out of its caches."""


class EncodedImages(NamedTuple):
    """embedding: [batch, dim], not normalised.

    pooled: [batch, width], what the projection to the joint space is applied to (SLIP's head works on it)
    tokens: [batch, tokens, width], a ViT's patches before its last norm, a ResNet's or another network's grid
    Each is None where a tower has no such thing.
    """

    embedding: Tensor
    pooled: Tensor | None
    tokens: Tensor | None


def encode_image(clip: Towers, pixels: Tensor, normed_tokens: bool = False, any_size: bool = False) -> EncodedImages:
    """Run open_clip's image tower on float [batch, 3, height, width]; nothing is computed twice.

    normed_tokens: a ViT's tokens are wanted after its last norm; any_size: of a ViT and a ResNet images may be smaller
    or larger than the tower's own, whose positions are then interpolated
    """
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    tower: Any = clip.visual
    if isinstance(tower, VisionTransformer):
        x = tower.transformer(_embed_patches(tower, pixels) if any_size else tower._embeds(pixels))
        pooled, normed = tower._pool(x)
        # Before the last norm, as in the public FILIP, and without the class token.
        return EncodedImages(project_image(clip, pooled), pooled, normed if normed_tokens else x[:, 1:])
    if isinstance(tower, ModifiedResNet):
        grid = tower.layer4(tower.layer3(tower.layer2(tower.layer1(tower.stem(pixels)))))
        pooled = _attention_pool(tower.attnpool, grid, any_size)
        return EncodedImages(project_image(clip, pooled), pooled, grid.flatten(2).transpose(1, 2))
    if isinstance(tower, TimmModel) and hasattr(tower.trunk, "forward_head"):
        return _encode_timm(tower, pixels)
    return EncodedImages(tower(pixels), None, None)


def before_projection(clip: Towers, pixels: Tensor) -> Tensor:
    """What `project_image` makes the embedding of: [batch, width], or a grid [batch, width, height, width].

    A grid where pooling is a part of the projection that learns (timm_pool = rot_attn); the embedding itself where
    there is no projection.
    """
    from open_clip.timm_model import TimmModel

    tower: Any = clip.visual
    if isinstance(tower, TimmModel) and hasattr(tower.trunk, "forward_head"):
        features: Tensor = tower.trunk.forward_head(tower.trunk.forward_features(pixels))
        return features
    encoded = encode_image(clip, pixels)
    return encoded.embedding if encoded.pooled is None else encoded.pooled


def project_image(clip: Towers, pooled: Tensor) -> Tensor:
    """The embedding [batch, dim] of what an image tower gives before its projection: see `before_projection`."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    tower: Any = clip.visual
    if isinstance(tower, VisionTransformer):
        return pooled if tower.proj is None else pooled @ tower.proj
    projected: Tensor = tower.attnpool.c_proj(pooled) if isinstance(tower, ModifiedResNet) else tower.head(pooled)
    return projected


def _embed_patches(tower: Any, pixels: Tensor) -> Tensor:
    """open_clip's own, with position embeddings for images of any size: [batch, 1 + patches, width]."""
    grid = tuple(side // patch for side, patch in zip(pixels.shape[2:], tower.patch_size, strict=True))
    if grid == tuple(tower.grid_size):
        own: Tensor = tower._embeds(pixels)
        return own
    x = tower.conv1(pixels).flatten(2).transpose(1, 2)
    first = tower.class_embedding.to(x.dtype).expand(len(x), 1, -1)
    x = torch.cat([first, x], dim=1) + resized_positions(tower.positional_embedding, tower.grid_size, grid).to(x.dtype)
    embedded: Tensor = tower.ln_pre(tower.patch_dropout(x))
    return embedded


def resized_positions(positions: Tensor, grid: tuple[int, ...], wanted: tuple[int, ...]) -> Tensor:
    """Position embeddings [1 + places, width] of a grid for another one, bicubically; the first row stays.

    By the factor (wanted + 0.1) / own a side, not by the wanted size, as DINO and COSMOS have it: it is the factor that
    says where the grid is read, and without the 0.1 a rounded one may give a place too few.
    """
    first, places = positions[:1], torch.unflatten(positions[1:], 0, grid).permute(2, 0, 1)[None]
    factors = tuple((new + 0.1) / old for new, old in zip(wanted, grid, strict=True))
    resized = F.interpolate(places, scale_factor=factors, mode="bicubic", align_corners=False)
    return torch.cat([first, resized[0].permute(1, 2, 0).flatten(0, 1)])


def _encode_timm(tower: TimmModel, pixels: Tensor) -> EncodedImages:
    features = tower.trunk.forward_features(pixels)
    pooled = tower.trunk.forward_head(features)
    embedding = tower.head(pooled)
    # Where timm's own classifier is the projection, or pooling is part of it, there is no such feature.
    before_projection = pooled.ndim == 2 and not getattr(tower.trunk, "num_classes", 0)
    return EncodedImages(embedding, pooled if before_projection else None, _timm_tokens(tower.trunk, features))


def _timm_tokens(trunk: nn.Module, features: Any) -> Tensor | None:
    if not isinstance(features, Tensor):
        return None
    if features.ndim == 3:
        return features[:, getattr(trunk, "num_prefix_tokens", 0) :]
    if features.ndim == 4:
        channels_last = str(getattr(trunk, "output_fmt", "NCHW")).endswith("NHWC")
        return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
    return None


def _attention_pool(pool: AttentionPool2d, grid: Tensor, any_size: bool) -> Tensor:
    """[batch, width, height, width] -> [batch, width], before the pool's last projection.

    The mean token alone asks: open_clip's lets every token ask and drops the answers.
    """
    tokens = grid.flatten(2).transpose(1, 2)
    tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
    positions = pool.positional_embedding
    if any_size and len(positions) != tokens.shape[1]:
        side = math.isqrt(len(positions) - 1)
        positions = resized_positions(positions, (side, side), tuple(grid.shape[2:]))
    tokens = tokens + positions.to(tokens.dtype)
    query, keys, values = pool.q_proj(tokens[:, :1]), pool.k_proj(tokens), pool.v_proj(tokens)
    heads = (x.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2) for x in (query, keys, values))
    return F.scaled_dot_product_attention(*heads).flatten(1)  # from [batch, heads, 1, head width]


TAKES_NO_SUCH_SIZE = (AssertionError, RuntimeError, ValueError)
"""What towers raise on an image of another size than theirs."""


@torch.no_grad()
def image_widths(clip: Towers, size: int, any_size: bool = False) -> tuple[int, int | None, int | None]:
    """Widths of the embedding, the pooled feature and the tokens, found by running one empty image of that side.

    any_size: as `encode_image`. Raises one of TAKES_NO_SUCH_SIZE.
    """
    was_training = clip.training
    clip.eval()
    parameter = next(clip.parameters())
    empty = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
    encoded = encode_image(clip, empty, any_size=any_size)
    clip.train(was_training)
    embedding, pooled, tokens = (None if x is None else x.shape[-1] for x in encoded)
    return embedding or 0, pooled, tokens
