"""What a text tower makes of token ids: the embedding, and a token for every position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.model.towers import Towers

GROUP = 64  # captions that run together on a CPU


class EncodedTexts(NamedTuple):
    """embedding: [batch, dim], not normalised; tokens: [batch, tokens, width], after the tower's last norm.

    pooled: [batch, width], what the projection to the joint space is applied to
    """

    embedding: Tensor
    tokens: Tensor
    pooled: Tensor


class TextFacts(NamedTuple):
    """What the rest has to know about a text tower.

    own_mask: its vocabulary has a mask token. Otherwise ids from `vocabulary` on stand for ours, which the tower
        never learns of: they take the mask embedding.
    """

    width: int
    vocabulary: int
    pad: int
    own_mask: bool


def is_huggingface(clip: Towers) -> bool:
    """Whether the text tower is a Hugging Face model."""
    return not hasattr(clip, "token_embedding") and not hasattr(clip.text, "token_embedding")


def text_facts(clip: Towers) -> TextFacts:
    """Width, vocabulary and padding of open_clip's own text transformer or of a Hugging Face model."""
    if is_huggingface(clip):
        config: Any = clip.text.config
        pad = config.pad_token_id
        width = clip.text.transformer.get_input_embeddings().embedding_dim
        for name in ("hidden_size", "d_model"):
            width = getattr(config, name, None) or width
        return TextFacts(width, config.vocab_size, 0 if pad is None else pad, own_mask=True)
    tower = transformer_of(clip)
    vocabulary, width = tower.token_embedding.weight.shape
    return TextFacts(width, vocabulary, getattr(tower, "pad_id", 0), own_mask=False)


def encode_text(
    clip: Towers, tokens: Tensor, mask_embedding: Tensor | None = None, whole: bool = False
) -> EncodedTexts:
    """open_clip's text tower on captions cut to any length (its own forward may want all positions).

    tokens: int64 [batch, tokens]; in open_clip's own transformer, ids beyond its vocabulary take `mask_embedding`
        [width].
    whole: tokens of the padding are wanted too. Otherwise, on a CPU, where time goes with the number of positions,
        captions run in groups of like length, so that short ones are not padded to the longest; the tokens after a
        caption's end are then 0.
    """
    if is_huggingface(clip):
        return by_length(clip, tokens, lambda rows, length: _encode_huggingface(clip, tokens[rows, :length]), whole)
    x = _embed(transformer_of(clip), tokens, mask_embedding)
    if not _any_length(clip):
        return _encode_padded(clip, tokens, x)
    return by_length(
        clip, tokens, lambda rows, length: _encode_group(clip, tokens[rows, :length], x[rows, :length]), whole
    )


def by_length(
    clip: Towers, tokens: Tensor, encode: Callable[[Tensor | slice, int], EncodedTexts], whole: bool
) -> EncodedTexts:
    """What `encode(rows, length)` makes of captions, int64 [batch, tokens], cut to a length; `whole` as `encode_text`.

    On a CPU rows come in groups of like length.
    """
    if whole or tokens.device.type != "cpu" or tokens.shape[0] <= GROUP or needs_full_captions(clip):
        return encode(slice(None), tokens.shape[1])
    lengths, order = cut_lengths(tokens, text_facts(clip).pad).sort()
    groups = zip(torch.split(order, GROUP), torch.split(lengths, GROUP), strict=True)
    encoded = [encode(rows, int(own[-1])) for rows, own in groups]
    back = order.argsort()
    longest = tokens.shape[1]
    final = torch.cat([F.pad(some.tokens, (0, 0, 0, longest - some.tokens.shape[1])) for some in encoded])
    embeddings, pooled = (
        torch.cat([getattr(some, name) for some in encoded])[back] for name in ("embedding", "pooled")
    )
    return EncodedTexts(embeddings, final[back], pooled)


def needs_full_captions(clip: Towers) -> bool:
    """Whether every caption has to come at full length: the tower pools another position or looks both ways."""
    return not is_huggingface(clip) and not _any_length(clip)


def trim(tokens: Tensor, pad: int = 0) -> Tensor:
    """Tokens cut to the longest caption: int64 [batch, tokens] padded at the end -> [batch, longest]."""
    return tokens[:, : int(cut_lengths(tokens, pad).max())]


def cut_lengths(tokens: Tensor, pad: int) -> Tensor:
    """Places of each caption that a tower has to see: int64 [batch], 1 at least.

    Where padding is not 0 one position more stays: some tokenizers pad with the end token, and the first one is read.
    """
    return (caption_lengths(tokens, pad) + (pad != 0)).clamp(1, tokens.shape[1])


def trim_for(clip: Towers, tokens: Tensor, pad: int = 0) -> Tensor:
    """Tokens of the context's length as the tower takes them: whole where it needs them so, else as `trim`."""
    return tokens if needs_full_captions(clip) else trim(tokens, pad)


def caption_mask(tokens: Tensor, pad: int = 0) -> Tensor:
    """bool [batch, tokens], false where a caption is padded."""
    return torch.arange(tokens.shape[1], device=tokens.device) < caption_lengths(tokens, pad)[:, None]


def caption_lengths(tokens: Tensor, pad: int = 0) -> Tensor:
    """Places up to the last that is no padding: int64 [batch]. (0 may be a word as well: it is "!" in CLIP's.)"""
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return ((tokens != pad) * places).amax(dim=1)


def transformer_of(clip: Towers) -> Any:
    """The module that holds open_clip's own text transformer: the model itself, or its text tower."""
    return clip if hasattr(clip, "token_embedding") else clip.text


def _pooling(clip: Towers) -> tuple[str, int]:
    tower = transformer_of(clip)
    if tower is clip:
        return clip.text_pool_type, getattr(clip, "text_eos_id", 2)
    return tower.pool_type, tower.eos_id


def _any_length(clip: Towers) -> bool:
    """Whether captions may be cut: no later position changes an earlier one, and the end token is the one pooled."""
    tower = transformer_of(clip)
    return tower.attn_mask is not None and getattr(tower, "cls_emb", None) is None and _pooling(clip)[0] == "argmax"


def _embed(tower: Any, tokens: Tensor, mask_embedding: Tensor | None) -> Tensor:
    if mask_embedding is None:
        plain: Tensor = tower.token_embedding(tokens)
        return plain
    masked = tokens >= tower.token_embedding.num_embeddings
    x = tower.token_embedding(tokens.masked_fill(masked, 0))
    return torch.where(masked.unsqueeze(-1), mask_embedding.to(x.dtype), x)


def _encode_group(clip: Towers, tokens: Tensor, x: Tensor) -> EncodedTexts:
    tower, length = transformer_of(clip), tokens.shape[1]
    x = x + tower.positional_embedding[:length]
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    x = tower.ln_final(x)
    # The end token is the largest id of a caption, as in open_clip, but for our mask token, which lies above.
    end = tokens.masked_fill(tokens >= tower.token_embedding.num_embeddings, -1).argmax(dim=-1)
    pooled = x[torch.arange(x.shape[0], device=x.device), end]
    return EncodedTexts(project_text(clip, pooled), x, pooled)


def _encode_padded(clip: Towers, tokens: Tensor, x: Tensor) -> EncodedTexts:
    """Towers that pool another position or look both ways: they see every caption at full length."""
    from open_clip.transformer import text_global_pool

    tower = transformer_of(clip)
    x = x + tower.positional_embedding[: tokens.shape[1]]
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))
    pool, eos = _pooling(clip)
    pooled = text_global_pool(x, tokens, pool, eos_token_id=eos)
    return EncodedTexts(project_text(clip, pooled), x, pooled)


def project_text(clip: Towers, pooled: Tensor) -> Tensor:
    """The embedding [batch, dim] of what a text tower pools, [batch, width]."""
    if is_huggingface(clip):
        found: Tensor = clip.text.proj(pooled)
        return found
    projection = transformer_of(clip).text_projection
    if projection is None:
        return pooled
    projected: Tensor = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
    return projected


def _encode_huggingface(clip: Towers, tokens: Tensor) -> EncodedTexts:
    tower = clip.text
    mask = (tokens != tower.config.pad_token_id).long()
    out = tower.transformer(input_ids=tokens, attention_mask=mask)
    pooled = tower.pooler(out, mask)
    return EncodedTexts(project_text(clip, pooled), out.last_hidden_state, pooled)
