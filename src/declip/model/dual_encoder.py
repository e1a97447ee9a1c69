"""Two towers that turn a batch of views into features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.architecture import Tune
from declip.data.batch import Batch
from declip.data.captions import lengthen, tokenize
from declip.data.tokenizer import EOT, Tokenizer
from declip.errors import InputError, first_line
from declip.model.image_tower import (
    TAKES_NO_SUCH_SIZE,
    EncodedImages,
    before_projection,
    encode_image,
    image_widths,
    project_image,
)
from declip.model.layers import image_above, image_below, text_above, text_below
from declip.model.mixing import convolved, mixed
from declip.model.parts import Part
from declip.model.recompute import has_batch_norm, recompute_blocks, recomputed
from declip.model.text_tower import (
    EncodedTexts,
    caption_mask,
    encode_text,
    needs_full_captions,
    project_text,
    text_facts,
)
from declip.model.tokenizer import build_tokenizer
from declip.model.towers import CONTEXT_LENGTH, build_towers, model_config, patch_dropouts
from declip.model.tuning import choose_parameters, rest, rest_batch_norms
from declip.ranks import ALONE, Ranks
from declip.recipe import Recipe

Encoded = TypeVar("Encoded", EncodedImages, EncodedTexts)

_STRIDE = 32  # of networks without patches, most of which end in a grid of such places

# Mean and standard deviation of pixels by name; the first are open_clip's own.
NORMALIZATIONS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def pixel_statistics(normalization: Any) -> tuple[Any, Any]:
    """Mean and standard deviation of red, green and blue that `model.normalization` says by name or in numbers."""
    return NORMALIZATIONS[normalization] if isinstance(normalization, str) else normalization


@dataclass(frozen=True)
class Features:
    """What the towers make of a batch, in float32 whatever the towers computed in.

    image: [image views, batch, dim], not normalised
    text: by text view [batch, dim], not normalised
    logit_scale: scalar, the factor on cosine similarities (already exponentiated)
    logit_bias: scalar, what the sigmoid term adds to them
    pooled_image: [image views, batch, width], before the projection to the joint space; None when no term asks
    image_tokens: [image views, batch, tokens, width]; None when no term asks
    text_tokens: by text view [batch, tokens, width], for the views that some term asks for
    text_mask: by text view bool [batch, tokens], false where a caption is padded, for the same views
    pooled_text: by text view [batch, width], before the projection to the joint space; empty when no term asks
    local_image: [small crops, batch, dim], not normalised; None when no term asks
    teacher_image, teacher_text: [views, batch, dim] each, normalised, what the moving average of the weights makes of
        the first image views and of some text views, without gradients; None when no term asks
    ranks: the processes that share the global batch; everything above is this one's part of it
    """

    image: Tensor
    text: dict[str, Tensor]
    logit_scale: Tensor
    logit_bias: Tensor | None = None
    pooled_image: Tensor | None = None
    image_tokens: Tensor | None = None
    text_tokens: dict[str, Tensor] = field(default_factory=dict)
    text_mask: dict[str, Tensor] = field(default_factory=dict)
    pooled_text: dict[str, Tensor] = field(default_factory=dict)
    local_image: Tensor | None = None
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None
    ranks: Ranks = ALONE

    @cached_property
    def unit_image(self) -> Tensor:
        return F.normalize(self.image.float(), dim=-1)

    def unit_texts(self, views: Sequence[str]) -> Tensor:
        """[len(views), batch, dim], normalised."""
        return torch.stack([self._unit_text[view] for view in views])

    @cached_property
    def _unit_text(self) -> dict[str, Tensor]:
        return {view: F.normalize(embedding.float(), dim=-1) for view, embedding in self.text.items()}

    def global_texts(self, views: Sequence[str]) -> Tensor:
        """`unit_texts` of the global batch: [len(views), global batch, dim]. A view is gathered once for all terms."""
        if new := [view for view in views if view not in self._global_text]:
            gathered = self.ranks.gather(self.unit_texts(new), dim=1)
            self._global_text.update(zip(new, gathered, strict=True))
        return torch.stack([self._global_text[view] for view in views])

    @cached_property
    def _global_text(self) -> dict[str, Tensor]:
        return {}


def _local_size(recipe: Recipe, clip: Any, view_size: int) -> int:
    """Side of small crops: three sevenths of the view's, as 96 of 224, in whole patches."""
    patch = getattr(clip.visual, "patch_size", _STRIDE)
    step = patch[0] if isinstance(patch, tuple) else patch
    return recipe.data.local_size or max(1, round(3 / 7 * view_size / step)) * step


class DualEncoder(nn.Module):
    """open_clip's towers, run once over all image views and once over all text views."""

    mean: Tensor
    std: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.clip = build_towers(recipe.model)
        self.tune: dict[Part, Tune] = {"image": recipe.model.image.tune, "text": recipe.model.text.tune}
        self.tune_layers = {"image": recipe.model.image.tune_layers, "text": recipe.model.text.tune_layers}
        for part, tune in self.tune.items():
            choose_parameters(self.clip, part, tune, self.tune_layers[part])
        size = self.clip.visual.image_size
        self.image_size: int = size[0] if isinstance(size, tuple) else size
        self.view_size: int = recipe.data.view_size or self.image_size
        text_cfg = model_config(recipe.model)["text_cfg"]
        self.context_length: int = text_cfg.get("context_length", CONTEXT_LENGTH)
        self.text = text_facts(self.clip)
        self.tokenizer = build_tokenizer(text_cfg, self.text.vocabulary)
        self.logit_scale_range, self.logit_scale_cap = recipe.model.logit_scale_range, recipe.model.logit_scale_cap
        self.views_apart = recipe.model.views_apart
        self.micro_batch, self.freeze_batch_norm = recipe.engine.micro_batch, recipe.model.freeze_batch_norm
        batch_norms = has_batch_norm(self.clip)
        if self.freeze_batch_norm and not batch_norms:
            raise InputError("model.freeze_batch_norm: these towers have no batch norms: leave it out.")
        if self.micro_batch and batch_norms and recipe.engine.sync_batch_norm and not self.freeze_batch_norm:
            raise InputError(
                "engine.micro_batch: batch norm in the towers would see one micro-batch at a time: allow it with "
                "engine.sync_batch_norm=false, or leave engine.micro_batch out."
            )
        if recipe.engine.grad_checkpointing:
            recompute_blocks(self.clip)
        self.whole_captions = recipe.pads_captions
        self.full_captions = recipe.pads_captions or needs_full_captions(self.clip)
        self._read_terms(recipe)
        if isinstance(self.tokenizer, Tokenizer) and self.text.vocabulary <= EOT:
            raise InputError(
                f"model.text.vocab_size = {self.text.vocabulary} is below the tokenizer's {EOT + 1} tokens."
            )
        masked = "masked" in recipe.text_views
        if masked and self.text.own_mask and self.tokenizer.special.mask >= self.text.vocabulary:
            raise InputError("model.text: this tower's tokenizer has no mask token, which the masked text view needs.")
        own = masked and not self.text.own_mask
        self.mask_embedding = nn.Parameter(torch.randn(self.text.width) * 0.02) if own else None
        for name, value in zip(("mean", "std"), pixel_statistics(recipe.model.normalization), strict=True):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1) * 255, persistent=False)
        self.train()  # what rests does from the start

    def _read_terms(self, recipe: Recipe) -> None:
        """What the recipe's terms ask for beyond embeddings; raises InputError where a tower cannot give it."""
        terms = recipe.terms.active()
        self.token_views: set[str] = {"masked"} if "masked_language" in terms else set()
        distilled = recipe.terms.distillation
        self.wants_pooled_text = "distillation" in terms and distilled is not None and distilled.teacher == "start"
        self.wants_pooled = "simclr" in terms or self.wants_pooled_text
        self.wants_normed_tokens = recipe.wants_normed_tokens
        self.wants_image_tokens = "token_wise" in terms or self.wants_normed_tokens
        if recipe.terms.token_wise and "token_wise" in terms:
            self.token_views |= set(recipe.terms.token_wise.texts)
        if recipe.terms.teacher_contrast and recipe.crosses:
            self.token_views.add(recipe.terms.teacher_contrast.seen_by_average[0])
        self.local_size = _local_size(recipe, self.clip, self.view_size) if recipe.local_views else 0
        try:
            size = f"model.image.image_size = {self.image_size}"
            self.dim, pooled, tokens = image_widths(self.clip, self.image_size)
            size = f"data.view_size = {self.view_size}"
            if self.view_size != self.image_size:
                image_widths(self.clip, self.view_size)
            size = f"data.local_size = {self.local_size}"
            if self.local_size:
                image_widths(self.clip, self.local_size, any_size=True)
        except TAKES_NO_SUCH_SIZE as error:
            raise InputError(f"model.image: the tower takes no images of {size}: {first_line(error)}.") from None
        if "simclr" in terms and pooled is None:
            raise InputError("terms.simclr: this image tower gives no feature before its projection.")
        if self.wants_image_tokens and tokens is None:
            term = next(name for name in ("token_wise", "text_conditioned", "teacher_contrast") if name in terms)
            raise InputError(f"terms.{term}: this image tower gives no tokens, one for each place of the image.")
        self.pooled_width, self.image_token_width = pooled or 0, tokens or 0

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 [batch, height, width, 3] -> normalised float [batch, 3, height, width], channels last in memory.

        Floating-point images are taken as normalised already.
        """
        return self._normalised(images).permute(0, 3, 1, 2)

    def _normalised(self, images: Tensor) -> Tensor:
        """[…, 3]"""
        if images.is_floating_point():
            return images
        return (images.float() - self.mean.flatten()) / self.std.flatten()

    def train(self, mode: bool = True) -> DualEncoder:
        super().train(mode)
        for part, tune in self.tune.items():
            if tune != "all":
                rest(self.clip, part)
        if self.freeze_batch_norm:
            rest_batch_norms(self.clip)
        return self

    def forward(self, batch: Batch) -> Features:
        image = self._encode_views(batch) if batch.kept_images is None else self._views_above(batch)
        views, size = len(batch.text_views), batch.sample_ids.shape[0]
        ids = batch.tokens.flatten(0, 1)
        if batch.kept_texts is None:
            texts = self._encode_texts(ids)
        else:
            texts = self.texts_above(ids, batch.kept_texts.flatten(0, 1).float())
        wanted: list[tuple[str, Tensor, Tensor]] = []
        if self.token_views:
            by_view = zip(batch.text_views, torch.unflatten(texts.tokens, 0, (views, size)), batch.tokens, strict=True)
            wanted = [(view, tokens, ids) for view, tokens, ids in by_view if view in self.token_views]
        scale = self.clip.logit_scale.exp()
        if self.logit_scale_cap is not None:
            # The value is capped, the gradient is that of the exponential, as in the reference.
            scale = scale + (scale.clamp(max=self.logit_scale_cap) - scale).detach()
        return Features(
            image=image.embedding.float(),  # the terms run outside of autocast, in float32
            text=dict(zip(batch.text_views, torch.unflatten(texts.embedding, 0, (views, size)).float(), strict=True)),
            logit_scale=scale,
            logit_bias=self.clip.logit_bias,
            pooled_image=image.pooled.float() if self.wants_pooled and image.pooled is not None else None,
            image_tokens=image.tokens.float() if self.wants_image_tokens and image.tokens is not None else None,
            text_tokens={view: tokens.float() for view, tokens, _ in wanted},
            pooled_text=dict(
                zip(batch.text_views, torch.unflatten(texts.pooled, 0, (views, size)).float(), strict=True)
            )
            if self.wants_pooled_text
            else {},
            text_mask={view: caption_mask(ids, self.tokenizer.special.pad) for view, _, ids in wanted},
            local_image=None if batch.local_images is None else self._encode_local(batch.local_images),
        )

    def _encode_local(self, images: Tensor) -> Tensor:
        """uint8 [small crops, batch, height, width, 3] -> [small crops, batch, dim], in float32."""
        embeddings = self._encode_images(images.flatten(0, 1), any_size=True).embedding
        return torch.unflatten(embeddings, 0, images.shape[:2]).float()

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """int64 [texts, tokens] as the text tower takes them, to the longest, or whole where it wants them so."""
        special = self.tokenizer.special
        tokens = tokenize([self.tokenizer.encode(text) for text in texts], self.context_length, special)
        return torch.from_numpy(lengthen(tokens, self.context_length, special.pad) if self.full_captions else tokens)

    def images_below(self, pixels: Tensor) -> Tensor:
        """What the part of the image tower that does not learn gives, before what learns: what may be kept.

        pixels: float [batch, 3, height, width], normalised. Returns tokens [batch, tokens, width], a grid [batch,
        height, width, width of the tower], or, of a locked tower, [batch, width] or the grid that is then pooled.
        """
        if self.tune["image"] == "last":
            states = image_below(self.clip, self.tune_layers["image"], pixels)
        else:
            states = before_projection(self.clip, pixels)
        return states.permute(0, 2, 3, 1) if states.ndim == 4 else states

    def images_above(self, states: Tensor) -> EncodedImages:
        """What the rest of the tower makes of what `images_below` has given, in float32."""
        states = states.permute(0, 3, 1, 2) if states.ndim == 4 else states
        if self.tune["image"] == "last":
            return image_above(self.clip, self.tune_layers["image"], states)
        return EncodedImages(project_image(self.clip, states), states, None)

    def texts_below(self, tokens: Tensor) -> Tensor:
        """As `images_below`, of int64 [batch, tokens]: [batch, tokens, width], or [batch, width] of a locked tower."""
        if self.tune["text"] == "last":
            return text_below(self.clip, self.tune_layers["text"], tokens)
        return encode_text(self.clip, tokens).pooled

    def texts_above(self, tokens: Tensor, states: Tensor) -> EncodedTexts:
        """As `images_above`, of captions; a locked tower needs no tokens."""
        if self.tune["text"] == "last":
            return text_above(self.clip, self.tune_layers["text"], tokens, states, self.whole_captions)
        return EncodedTexts(project_text(self.clip, states), states[:, None], states)

    def _views_above(self, batch: Batch) -> EncodedImages:
        """Of what `images_below` has given; every output is [image views, batch, …]."""
        assert batch.kept_images is not None
        kept = batch.kept_images if batch.own_share is None else mixed(batch.kept_images, batch.own_share)
        found = self.images_above(kept.flatten(0, 1).float())
        wanted = found.embedding, found.pooled if self.wants_pooled else None, found.tokens
        return EncodedImages(*(None if x is None else torch.unflatten(x, 0, kept.shape[:2]) for x in wanted))  # type: ignore[arg-type]

    def _encode_views(self, batch: Batch) -> EncodedImages:
        """Of pixels; every output is [image views, batch, …]."""
        images = batch.images
        if batch.filters is not None:
            images = convolved(self._normalised(images), batch.filters)
        if batch.own_share is not None:
            images = mixed(self._normalised(images), batch.own_share)
        if self.views_apart:
            apart = [self._encode_images(view) for view in images]
            return EncodedImages(*(None if x[0] is None else torch.stack(x) for x in zip(*apart, strict=True)))  # type: ignore[arg-type]
        together = self._encode_images(images.flatten(0, 1))
        return EncodedImages(*(None if x is None else torch.unflatten(x, 0, images.shape[:2]) for x in together))  # type: ignore[arg-type]

    def _encode_images(self, images: Tensor, any_size: bool = False) -> EncodedImages:
        """uint8 [batch, height, width, 3], or float, normalised"""

        def encode(some: Tensor) -> EncodedImages:
            pixels = self.pixels(some)
            embedding, pooled, tokens = encode_image(self.clip, pixels, self.wants_normed_tokens, any_size)
            return EncodedImages(
                embedding, pooled if self.wants_pooled else None, tokens if self.wants_image_tokens else None
            )

        return self._in_pieces(encode, images)

    def _encode_texts(self, tokens: Tensor) -> EncodedTexts:
        """int64 [batch, tokens]"""
        return self._in_pieces(
            lambda some: encode_text(self.clip, some, self.mask_embedding, self.whole_captions), tokens
        )

    def _in_pieces(self, encode: Callable[[Tensor], Encoded], rows: Tensor) -> Encoded:
        """`encode(rows)`, a micro-batch at a time (Gao et al. 2021, arXiv:2101.06983)."""
        count = math.ceil(len(rows) / (self.micro_batch or len(rows)))
        if count == 1 or not torch.is_grad_enabled():
            return encode(rows)
        pieces = [recomputed(self.clip, encode, some) for some in rows.tensor_split(count)]
        return type(pieces[0])(*(None if x[0] is None else torch.cat(x) for x in zip(*pieces, strict=True)))  # type: ignore[no-any-return]

    def leave_out_patches(self, share: float) -> None:
        """Set patch dropout, from the next forward pass on."""
        for dropout in patch_dropouts(self.clip):
            dropout.prob = share

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the logit scale (a logarithm) in the recipe's range; called after each optimizer step."""
        self.clip.logit_scale.clamp_(*self.logit_scale_range)
