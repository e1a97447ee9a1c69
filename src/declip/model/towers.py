"""The two towers, built by open_clip, and their forwards: a ResNet pooled with one query, captions of any length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.errors import InputError
from declip.recipe import Model

if TYPE_CHECKING:
    from open_clip.model import CLIP
    from open_clip.modified_resnet import AttentionPool2d

MASK_ID = 49408  # one past open_clip's vocabulary: the mask token is ours, the open_clip model never sees it
EOT_ID = 49407
GROUP = 64  # captions that run together on a CPU


def model_config(model: Model) -> dict[str, Any]:
    """The architecture in the words of an open_clip model config."""
    if model.name is None:
        unused = {"patch_size"} if isinstance(model.image.layers, list) else set()
        config: dict[str, Any] = {
            "embed_dim": model.embed_dim,
            "vision_cfg": model.image.model_dump(exclude=unused),
            "text_cfg": model.text.model_dump(),
        }
        if model.quick_gelu:
            config["quick_gelu"] = True
        return config
    import open_clip

    named: dict[str, Any] | None = open_clip.get_model_config(model.name)
    if named is None:
        raise InputError(f"model.name = {model.name!r}: open_clip knows no such architecture.")
    return named


def build_towers(model: Model) -> CLIP:
    """An open_clip model with random weights; raises InputError where open_clip refuses the description."""
    from open_clip.model import CLIP

    config = model_config(model)
    if "hf_model_name" in config["text_cfg"] or config.get("custom_text"):
        raise InputError("model: only open_clip's own text transformer can be trained so far.")
    vision = dict(config["vision_cfg"])
    if vision["image_size"] < (vision.get("patch_size") or 0):
        raise InputError(
            f"model.image: images of {vision['image_size']} px are smaller than a patch of {vision['patch_size']} px."
        )
    if model.patch_dropout:
        vision["patch_dropout"] = model.patch_dropout
    try:
        clip = CLIP(
            embed_dim=config["embed_dim"],
            vision_cfg=vision,
            text_cfg=config["text_cfg"],
            quick_gelu=config.get("quick_gelu", False),
            init_logit_scale=model.logit_scale_init,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"model: open_clip cannot build these towers: {error}.") from None
    if model.freeze_patch_embedding and hasattr(clip.visual, "conv1"):
        clip.visual.conv1.weight.requires_grad_(False)
    return clip


def encode_image(clip: CLIP, pixels: Tensor) -> Tensor:
    """open_clip's image tower: float [batch, 3, height, width] -> embeddings [batch, dim], not normalised.

    A ResNet's attention pool asks with the mean token alone: open_clip's lets every token ask and drops the answers.
    """
    from open_clip.modified_resnet import ModifiedResNet

    tower = clip.visual
    if not isinstance(tower, ModifiedResNet):
        embeddings: Tensor = tower(pixels)
        return embeddings
    grid = tower.layer4(tower.layer3(tower.layer2(tower.layer1(tower.stem(pixels)))))
    return _attention_pool(tower.attnpool, grid)


def _attention_pool(pool: AttentionPool2d, grid: Tensor) -> Tensor:
    """[batch, width, height, width] -> [batch, dim]"""
    tokens = grid.flatten(2).transpose(1, 2)
    tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
    tokens = tokens + pool.positional_embedding.to(tokens.dtype)
    query, keys, values = pool.q_proj(tokens[:, :1]), pool.k_proj(tokens), pool.v_proj(tokens)
    heads = (x.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2) for x in (query, keys, values))
    pooled = F.scaled_dot_product_attention(*heads)  # [batch, heads, 1, head width]
    projected: Tensor = pool.c_proj(pooled.flatten(1))
    return projected


def encode_text(clip: CLIP, tokens: Tensor, mask_embedding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """open_clip's text tower on captions cut to any length (its own forward wants all 77 positions).

    tokens: int64 [batch, tokens]; ids equal to MASK_ID take `mask_embedding` [width].
    Returns the embeddings [batch, dim], not normalised, and the final tokens [batch, tokens, width].

    On a CPU, where time goes with the number of positions, captions run in groups of like length, so that short ones
    are not padded to the longest; the positions after a caption's end are then 0.
    """
    x = _embed(clip, tokens, mask_embedding)
    if tokens.device.type != "cpu" or tokens.shape[0] <= GROUP:
        return _encode_group(clip, tokens, x)
    lengths, order = (tokens != 0).sum(dim=1).sort()
    groups = zip(torch.split(order, GROUP), torch.split(lengths, GROUP), strict=True)
    encoded = [_encode_group(clip, tokens[rows, : int(own[-1])], x[rows, : int(own[-1])]) for rows, own in groups]
    back = order.argsort()
    longest = tokens.shape[1]
    final = torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[1])) for _, x in encoded])
    return torch.cat([embedding for embedding, _ in encoded])[back], final[back]


def trim(tokens: Tensor) -> Tensor:
    """Tokens cut to the longest caption: int64 [batch, tokens] padded with 0 -> [batch, longest]."""
    return tokens[:, : int((tokens != 0).sum(dim=1).max())]


def _embed(clip: CLIP, tokens: Tensor, mask_embedding: Tensor | None) -> Tensor:
    if mask_embedding is None:
        plain: Tensor = clip.token_embedding(tokens)
        return plain
    masked = tokens == MASK_ID
    x = clip.token_embedding(tokens.masked_fill(masked, 0))
    return torch.where(masked.unsqueeze(-1), mask_embedding.to(x.dtype), x)


def _encode_group(clip: CLIP, tokens: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    length = tokens.shape[1]
    x = x + clip.positional_embedding[:length]
    x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
    x = clip.ln_final(x)
    # The first end token closes the caption (masked captions hold ids above it, so open_clip's argmax would miss it).
    end = (tokens == EOT_ID).int().argmax(dim=-1)
    pooled = x[torch.arange(x.shape[0], device=x.device), end]
    projection = clip.text_projection
    return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection, x
