"""Zero-shot classification: how often the class whose prompts lie nearest is the right one."""

from __future__ import annotations

import torch
from torch import Tensor

from declip.evaluation.retrieval import chunks, not_below, percent_within
from declip.model.token_similarity import similarity


def zero_shot_metrics(
    image_embeddings: Tensor, class_embeddings: Tensor, labels: Tensor, subset: Tensor | None = None
) -> dict[str, float]:
    """Accuracy in percent: ``top1``, ``top5`` and ``mean_per_class``, the mean over classes of their images' top-1.

    Takes what `zero_shot_ranks` takes, and raises what it raises. With fewer than five classes top-5 is top-all, hence
    100 but for ties. Classes without an image take no part in ``mean_per_class``.
    """
    ranks = zero_shot_ranks(image_embeddings, class_embeddings, labels, subset)
    return metrics_of_ranks(ranks, labels, len(class_embeddings if subset is None else subset))


def metrics_of_ranks(ranks: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """What `zero_shot_metrics` returns, of what `zero_shot_ranks` returns; classes: among how many was chosen."""
    return {
        "top1": percent_within(ranks, 1),
        "top5": percent_within(ranks, min(5, classes)),
        "mean_per_class": 100.0 * mean_per_class(ranks < 1, labels),
    }


def mean_per_class(hits: Tensor, labels: Tensor) -> float:
    """The mean over classes of the share of hits, bool ``[n]``, among the items whose label ``[n]`` it is."""
    _, place = torch.unique(labels, return_inverse=True)
    shares = torch.bincount(place, weights=hits.to(place.device).double()) / torch.bincount(place)
    return float(shares.mean())


@torch.no_grad()
def zero_shot_ranks(
    image_embeddings: Tensor, class_embeddings: Tensor, labels: Tensor, subset: Tensor | None = None
) -> Tensor:
    """How many wrong classes stand above each image's own: int64 ``[images]``, 0 = the right class is first.

    Args:
        image_embeddings: float32 ``[images, width]``, normalised; of a model that compares tokens, both are
            ``[n, tokens, width]``, compared from image to class (as in the public FILIP).
        class_embeddings: float32 ``[classes, width]``, normalised.
        labels: int64 ``[images]``, the row of each image's class.
        subset: int64 ``[k]``, rows of the only classes to choose from (of ImageNet's thousand, ImageNet-A and -R have
            200 each); labels still count among all classes.

    Ties are counted against the model, as in retrieval.
    Raises ValueError where there is no image or a label does not fit.
    """
    classes = len(class_embeddings)
    if not len(labels) or labels.shape != (len(image_embeddings),):
        raise ValueError(f"{len(image_embeddings)} images need one label each, not {tuple(labels.shape)}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"a label points outside the {classes} classes")
    labels = labels.to(image_embeddings.device)
    if subset is not None:
        subset = subset.to(class_embeddings.device)
        labels, class_embeddings = _rows_in(subset, labels, classes), class_embeddings[subset]
    ranks = []
    for rows in chunks(len(labels), classes):
        scores = similarity(image_embeddings[rows], class_embeddings)
        right = scores.gather(1, labels[rows, None])
        ranks.append(not_below(scores, right).sum(1) - 1)
    return torch.cat(ranks)


def _rows_in(subset: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Where in the subset each label stands."""
    if len(set(subset.tolist())) < len(subset) or subset.min() < 0 or subset.max() >= classes:
        raise ValueError(f"the subset must name rows of the {classes} classes, each once")
    place = torch.full((classes,), -1, device=labels.device)
    place[subset] = torch.arange(len(subset), device=labels.device)
    if (place[labels] < 0).any():
        raise ValueError("a label is outside the subset of the classes")
    return place[labels]
