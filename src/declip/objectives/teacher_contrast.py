"""Learning from a moving average of the weights: each view finds what the average makes of its pair among all others.

Self-distillation by contrast, as COSMOS has it (Kim et al., CVPR 2025, §3.2): negatives keep it from collapsing, so it
needs neither predictor nor centring. With cross-attention it is COSMOS whole (§3.3).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from declip.data.batch import Batch
from declip.model.dual_encoder import Features
from declip.model.heads import CrossModal
from declip.objectives.contrastive import multi_view_infonce
from declip.objectives.own_scale import OwnScale
from declip.ranks import ALONE, Ranks

PARTS = ("image_to_image", "image_to_text", "text_to_image", "text_to_text")
"""Whose views find what the average makes of which side."""


def contrast(
    views: Tensor, targets: Tensor, scale: Tensor, ranks: Ranks = ALONE, without: Collection[tuple[int, int]] = ()
) -> Tensor:
    """Mean of `multi_view_infonce` over all views × targets but `without`: [views, batch, dim] each -> a scalar.

    Both normalised; targets carry no gradient. ranks: these are one rank's rows of a larger batch.
    """
    candidates = None if ranks.count == 1 else (ranks.gather(views, dim=1), ranks.gather(targets, dim=1))
    first = ranks.rank * views.shape[1]
    if not without:
        return multi_view_infonce(views, targets, scale, candidates=candidates, first=first)
    cells = []
    for view in range(len(views)):
        for target in range(len(targets)):
            if (view, target) not in without:
                one, other = slice(view, view + 1), slice(target, target + 1)
                all_rows = None if candidates is None else (candidates[0][one], candidates[1][other])
                cells.append(multi_view_infonce(views[one], targets[other], scale, candidates=all_rows, first=first))
    return torch.stack(cells).mean()


class TeacherContrast(OwnScale):
    """The weighted sum of four `contrast`s: the student's image views and texts with the average's, either way.

    With `cross`, the student's embeddings first take up what they find in the other side's tokens of the first views
    (COSMOS, eq. 4): h = f + CrossPool(f, tokens), f not normalised. The two parts across modalities can then be met
    without any alignment, as h of the right pair alone has seen the target's tokens: their values stand apart in the
    log, and what counts is the held-out score.

    The logit scale, a logarithm, is the term's own.

    weights: of PARTS; own_view: a view also meets what the average makes of the very same view
    """

    def __init__(
        self,
        images: int,
        texts: Sequence[str],
        teacher_texts: Sequence[str],
        weights: Sequence[float] = (0.5, 0.0, 0.0, 0.5),
        own_view: bool = True,
        cross: CrossModal | None = None,
        mask_padding: bool = True,
        logit_scale_init: float = 2.6593,
        logit_scale_range: tuple[float, float] = (0.0, 4.6052),
    ) -> None:
        super().__init__(logit_scale_init, logit_scale_range)
        self.images, self.texts, self.teacher_texts = images, tuple(texts), tuple(teacher_texts)
        self.weights, self.own_view = dict(zip(PARTS, weights, strict=True)), own_view
        self.cross, self.mask_padding = cross, mask_padding
        self.parts: dict[str, Tensor] = {}  # of the last forward pass, for the log

    def forward(self, features: Features, batch: Batch) -> Tensor:
        if features.teacher_image is None or features.teacher_text is None:
            raise ValueError("the teacher's contrast needs what the moving average makes of the batch")
        images = features.image[: self.images]
        if features.local_image is not None:
            images = torch.cat([images, features.local_image])
        texts = torch.stack([features.text[view] for view in self.texts])
        if self.cross is not None:
            images, texts = self._crossed(images, texts, features)
        student = {"image": F.normalize(images, dim=-1), "text": F.normalize(texts, dim=-1)}
        teacher = {"image": features.teacher_image, "text": features.teacher_text}
        scale, total = self.logit_scale.exp(), features.logit_scale.new_zeros(())
        for part, weight in self.weights.items():
            if weight:
                of, to = part.split("_to_")
                value = contrast(student[of], teacher[to], scale, features.ranks, self._without(of, to))
                self.parts[part] = value.detach()
                total = total + weight * value
        return total

    def _crossed(self, images: Tensor, texts: Tensor, features: Features) -> tuple[Tensor, Tensor]:
        """Embeddings [views, batch, dim] of both sides with what each has found in the other's first view."""
        assert self.cross is not None
        first = self.teacher_texts[0]
        if features.image_tokens is None or first not in features.text_tokens:
            raise ValueError("cross-attention needs the towers' tokens")
        words, mask = self.cross.text_mapping(features.text_tokens[first]), features.text_mask[first]
        patches = self.cross.image_mapping(features.image_tokens[0])
        return (
            images + self.cross.from_text(images, words, mask if self.mask_padding else None),
            texts + self.cross.from_image(texts, patches),
        )

    def _without(self, of: str, to: str) -> set[tuple[int, int]]:
        """Which pairs of views are one view, where those are left out."""
        if self.own_view or of != to:
            return set()
        if of == "image":
            return {(view, view) for view in range(self.images)}
        return {(self.texts.index(view), place) for place, view in enumerate(self.teacher_texts) if view in self.texts}
