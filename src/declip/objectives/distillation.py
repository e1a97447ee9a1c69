"""Learning from a teacher's embeddings: a larger model's, or those of the towers as they started."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.dual_encoder import Features
from declip.ranks import ALONE, Ranks


class Distillation(nn.Module):
    """A student's embeddings near a teacher's, and its similarities of images and texts like the teacher's.

    The first is feature distillation as CLIP-KD has it (Yang et al. 2024, arXiv:2307.12732, §3.2): each side's
    embedding is mapped to the teacher's width. The second is TinyCLIP's affinity mimicking (Wu et al. 2023,
    arXiv:2309.12314, eq. 4), which CLIP-KD calls contrastive relational distillation.

    widths: of the student's embedding and of the teacher's; None of a teacher that is the start, whose pooled features
        need no mapping and know no similarities
    """

    def __init__(
        self, widths: tuple[int, int] | None, images: int, features: float, similarities: float, teacher_scale: float
    ) -> None:
        super().__init__()
        self.images, self.weights, self.teacher_scale = images, (features, similarities), teacher_scale
        self.of_start = widths is None
        if widths is not None:
            self.image, self.text = (nn.Linear(*widths, bias=False) for _ in range(2))

    def forward(self, features: Features, batch: Batch) -> Tensor:
        near, alike = self.weights
        image, text = batch.teacher_images, batch.teacher_texts
        total = features.logit_scale.new_zeros(())
        if near:
            total = total + near * self._near(features, image, text)
        if alike and image is not None and text is not None and not self.of_start:
            students = features.unit_image[: self.images], features.unit_texts(["caption"])[0]
            loss = similarity_loss(*students, image, text, features.logit_scale, self.teacher_scale, features.ranks)
            total = total + alike * loss
        return total

    def _near(self, features: Features, image: Tensor | None, text: Tensor | None) -> Tensor:
        """The mean over the sides that the teacher has."""
        losses = []
        if image is not None:
            student = features.pooled_image if self.of_start else features.image
            assert student is not None
            own = student[: self.images] if self.of_start else self.image(student[: self.images])
            losses.append(feature_loss(own, image, features.ranks))
        if text is not None:
            own = features.pooled_text["caption"] if self.of_start else self.text(features.text["caption"])
            losses.append(feature_loss(own[None], text, features.ranks))
        return torch.stack(losses).mean()


def feature_loss(students: Tensor, teacher: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Mean of 1 - cosine of [views, batch, width] and the teacher's [batch, width]; rows that are NaN take no part."""
    known = teacher.isfinite().all(-1)
    distance = 1 - F.cosine_similarity(students, teacher.nan_to_num(), dim=-1)
    share = ranks.count / ranks.sum(known.sum()).clamp(min=1)
    return (distance * known).mean(0).sum() * share


def similarity_loss(
    images: Tensor,
    texts: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    logit_scale: Tensor,
    teacher_scale: float,
    ranks: Ranks = ALONE,
) -> Tensor:
    """½ [KL(teacher || student) of each image over all texts + of each text over all images], mean over image views.

    images: [views, batch, dim], texts: [batch, dim], teacher_images and teacher_texts: [batch, width], all normalised.
    Rows of which the teacher knows nothing (NaN) are no candidates either.
    """
    known = teacher_images.isfinite().all(-1) & teacher_texts.isfinite().all(-1)
    teacher_images, teacher_texts = teacher_images.nan_to_num(), teacher_texts.nan_to_num()
    all_known, all_texts = ranks.gather(known), ranks.gather(texts)
    all_images = ranks.gather(images, dim=1)
    share = ranks.count / all_known.sum().clamp(min=1)
    hidden = torch.where(all_known, 0.0, float("-inf"))

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        target = (teacher_scale * teacher + hidden).softmax(-1)
        logits = (logit_scale * student + hidden).log_softmax(-1)
        lost = torch.where(target > 0, target * (target.log() - logits), 0.0).sum(-1)
        return (lost * known).sum(-1) * share

    there = divergence(images @ all_texts.T, teacher_images @ ranks.gather(teacher_texts).T)
    back = divergence(texts @ all_images.transpose(1, 2), teacher_texts @ ranks.gather(teacher_images).T)
    return ((there + back) / 2).mean()
