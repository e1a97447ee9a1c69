"""Zero-shot classification: how often the class whose prompts lie nearest is the right one."""

from __future__ import annotations

import torch
from torch import Tensor

from declip.evaluation.retrieval import chunks, not_below, percent_within
from declip.model.token_similarity import similarity


def zero_shot_metrics(image_embeddings: Tensor, class_embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent; with fewer than five classes top-5 is top-all, hence 100.

    Args:
        image_embeddings: float32 ``[images, width]``, normalised; of a model that compares tokens, both are
            ``[n, tokens, width]``, compared from image to class (as in the public FILIP).
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
        scores = similarity(image_embeddings[rows], class_embeddings)
        right = scores.gather(1, labels[rows, None])
        ranks.append(not_below(scores, right).sum(1) - 1)
    rank = torch.cat(ranks)
    return {"top1": percent_within(rank, 1), "top5": percent_within(rank, min(5, classes))}
