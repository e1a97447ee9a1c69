"""Zero-shot classification: a class is the mean of its prompts' embeddings (Radford et al. 2021, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from declip.evaluation.prompts import fill, resolve_templates
from declip.evaluation.retrieval import chunks, not_below, percent_within

_PROMPTS_AT_ONCE = 4096


class TextEncoder(Protocol):
    """What a model must be able to do here: texts to normalised embeddings ``[texts, width]``."""

    def encode_text(self, texts: list[str]) -> Any: ...


def class_embeddings(model: TextEncoder, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
    """One normalised float32 vector a class: encode every prompt, normalise, average, normalise: ``[classes, width]``.

    Templates are sentences with ``{}`` for the class name, or the names of sets; by default OpenAI's 80.
    Raises InputError where a template has no ``{}``.
    """
    templates = resolve_templates(templates)
    step = max(1, _PROMPTS_AT_ONCE // len(templates))
    means = []
    for start in range(0, len(class_names), step):
        names = class_names[start : start + step]
        prompts = [fill(template, name) for name in names for template in templates]
        embeddings = functional.normalize(torch.as_tensor(model.encode_text(prompts)).float().cpu(), dim=-1)
        means.append(embeddings.view(len(names), len(templates), -1).mean(1))
    return functional.normalize(torch.cat(means), dim=-1)


def zero_shot_metrics(image_embeddings: Tensor, class_embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent; with fewer than five classes top-5 is top-all, hence 100.

    Args:
        image_embeddings: float32 ``[images, width]``, normalised.
        class_embeddings: float32 ``[classes, width]``, normalised.
        labels: int64 ``[images]``, the row of each image's class.

    Ties are counted against the model, as in retrieval.
    Raises ValueError where there is no image or a label does not fit.
    """
    classes = len(class_embeddings)
    if not len(labels) or labels.shape != (len(image_embeddings),):
        raise ValueError(f"{len(image_embeddings)} images need one label each, not {tuple(labels.shape)}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"a label points outside the {classes} classes")
    ranks = []
    for rows in chunks(len(labels), classes):
        scores = image_embeddings[rows] @ class_embeddings.T
        right = scores.gather(1, labels[rows, None])
        ranks.append(not_below(scores, right).sum(1) - 1)
    rank = torch.cat(ranks)
    return {"top1": percent_within(rank, 1), "top5": percent_within(rank, min(5, classes))}
