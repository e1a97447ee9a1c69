"""Patches against words: FILIP's token-wise similarity (Yao et al., ICLR 2022), DeFILIP's L_FAS."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from declip.data.batch import Batch
from declip.model.dual_encoder import Features
from declip.model.heads import TokenMappings
from declip.model.token_similarity import MeanBestMatch
from declip.objectives.contrastive import symmetric_cross_entropy
from declip.objectives.own_scale import OwnScale
from declip.ranks import ALONE, Ranks


def token_wise_similarity(
    images: Tensor,
    texts: Tensor,
    text_mask: Tensor | None = None,
    top_k: int | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor]:
    """FILIP's similarities between every image and every text (FILIP, eq. 4 and 5), [batch, batch of all ranks] each.

    images: [batch, patches, dim] and texts: [batch, words, dim], normalised; text_mask: bool [batch, words], false
    where there is no word (not given: all count).

        image → text [b, l] = mean over patches i of b of  max over words j of l of  <V_bi, T_lj>
        text → image [l, b] = mean over words j of l of  max over patches i of b of  <T_lj, V_bi>

    top_k: of the side that the maximum is over, only the k tokens count that are most like all tokens of the sample's
        own other side. The public code keeps 16; by default all count, as in the FILIP paper.

    Memory goes with one chunk of token similarities, never with batch² × patches × words.
    """
    patch_weights = images.new_full(images.shape[:2], 1 / images.shape[1])
    counts = torch.ones_like(texts[..., 0]) if text_mask is None else text_mask.to(texts.dtype)
    word_weights = counts / counts.sum(dim=1, keepdim=True)
    if top_k is None and ranks.count == 1:
        image_to_text, text_to_image = MeanBestMatch.apply(images, texts, patch_weights, word_weights, text_mask, True)
        return image_to_text, text_to_image.T
    if top_k is None:
        some_words, some_patches, kept_mask = texts, images, text_mask
    else:
        some_words, some_patches, kept_mask = _best_tokens(images, texts, counts, text_mask, top_k)
    some_words, some_patches = ranks.gather_padded(some_words), ranks.gather(some_patches)
    kept_mask = None if kept_mask is None else ranks.gather_padded(kept_mask)
    none = images.new_empty(0)
    image_to_text, _ = MeanBestMatch.apply(images, some_words, patch_weights, none, kept_mask, False)
    text_to_image, _ = MeanBestMatch.apply(texts, some_patches, word_weights, none, None, False)
    return image_to_text, text_to_image


def _best_tokens(
    images: Tensor, texts: Tensor, counts: Tensor, text_mask: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The words and the patches of each sample that are most like its own other side, and the words' mask."""
    own = images.detach() @ (texts.detach() * counts[..., None]).transpose(1, 2)  # [batch, patches, words]
    words_score = own.sum(dim=1) if text_mask is None else own.sum(dim=1).masked_fill(~text_mask, float("-inf"))
    kept_words = words_score.topk(min(top_k, texts.shape[1]), dim=1).indices
    kept_patches = own.sum(dim=2).topk(min(top_k, images.shape[1]), dim=1).indices
    kept_mask = None if text_mask is None else text_mask.gather(1, kept_words)
    return _take(texts, kept_words), _take(images, kept_patches), kept_mask


def _take(tokens: Tensor, rows: Tensor) -> Tensor:
    """[batch, tokens, dim], [batch, k] -> [batch, k, dim]"""
    return tokens.gather(1, rows[..., None].expand(-1, -1, tokens.shape[-1]))


def token_wise_infonce(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    text_mask: Tensor | None = None,
    top_k: int | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """½ [CE(s · image → text) + CE(s · text → image)] on `token_wise_similarity`'s two matrices; a scalar."""
    image_to_text, text_to_image = token_wise_similarity(images, texts, text_mask, top_k, ranks)
    first = ranks.rank * len(images)
    return symmetric_cross_entropy(logit_scale * image_to_text, logit_scale * text_to_image, first=first)


class TokenWise(OwnScale):
    """Mean `token_wise_infonce` over the first `images` image views × the text views named.

    Patches and words are mapped to `dim` and normalised; the term has a logit scale of its own (a logarithm, kept in
    `logit_scale_range`).

    mask_padding: padding takes no part. The public code counts the padding of all 77 positions, as words that are found
        and as words that search.
    """

    def __init__(
        self,
        mappings: TokenMappings,
        images: int,
        texts: Sequence[str],
        top_k: int | None = None,
        mask_padding: bool = True,
        logit_scale_init: float = 2.6593,
        logit_scale_range: tuple[float, float] = (0.0, 4.6052),
    ) -> None:
        super().__init__(logit_scale_init, logit_scale_range)
        self.mappings, self.images, self.texts = mappings, images, tuple(texts)
        self.top_k, self.mask_padding = top_k, mask_padding

    def forward(self, features: Features, batch: Batch) -> Tensor:
        if features.image_tokens is None or not set(self.texts) <= features.text_tokens.keys():
            raise ValueError("the token-wise term needs the towers' tokens")
        scale = self.logit_scale.exp()
        images = [self.mappings.map_image(tokens) for tokens in features.image_tokens[: self.images]]
        cells = []
        for view in self.texts:
            texts = self.mappings.map_text(features.text_tokens[view])
            mask = features.text_mask[view] if self.mask_padding else None
            cells += [token_wise_infonce(image, texts, scale, mask, self.top_k, features.ranks) for image in images]
        return torch.stack(cells).mean()
