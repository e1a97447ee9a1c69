"""How much of a model's score is left when the pictures are blurred, noisy, compressed or dark."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from declip.data.decode import Pixels, decode_image
from declip.evaluation.corruptions import CORRUPTIONS, corrupt
from declip.evaluation.details import Robustness
from declip.evaluation.embedding import Embedded, Encoder
from declip.evaluation.retrieval import retrieval_metrics
from declip.evaluation.sets import TestSet
from declip.evaluation.tasks import Labelled, Texts
from declip.evaluation.zero_shot import zero_shot_metrics
from declip.progress import Progress

ITEMS = 500
"""Images that are judged at each severity."""
SEVERITIES = (1, 3, 5)

_AT_ONCE = 64  # decoded images


def of_retrieval(
    model: Encoder, test: TestSet, embedded: Embedded, texts: Texts, seed: int, progress: Progress | None
) -> list[Robustness]:
    """Recall at 1 from caption to picture among at most ITEMS pictures."""
    chosen = _chosen(len(texts.captioned), seed)
    place = torch.full((len(texts.captioned),), -1)
    place[chosen] = torch.arange(len(chosen))
    own = (place[texts.image] >= 0).nonzero()[:, 0]
    captions, owner = texts.embeddings[texts.rows[own]], place[texts.image[own]]

    def judge(images: Tensor) -> float:
        return retrieval_metrics(images, captions, owner)["text_to_image_r1"]

    return _curves(model, test, embedded, texts.captioned[chosen], "text_to_image_r1", judge, seed, progress)


def of_zero_shot(
    model: Encoder,
    test: TestSet,
    embedded: Embedded,
    of: Labelled,
    classes: Tensor,
    seed: int,
    progress: Progress | None,
) -> list[Robustness]:
    """Zero-shot top-1 of at most ITEMS pictures."""
    readable = of.readable.nonzero()[:, 0]
    chosen = readable[_chosen(len(readable), seed)]
    truth = of.classes[chosen]

    def judge(images: Tensor) -> float:
        return zero_shot_metrics(images, classes, truth)["top1"]

    return _curves(model, test, embedded, of.rows[chosen], "top1", judge, seed, progress)


def _chosen(count: int, seed: int) -> Tensor:
    return torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(count)[:ITEMS]))


def _curves(
    model: Encoder,
    test: TestSet,
    embedded: Embedded,
    rows: Tensor,
    metric: str,
    judge: Callable[[Tensor], float],
    seed: int,
    progress: Progress | None,
) -> list[Robustness]:
    places = embedded.rows[rows].tolist()
    clean = judge(embedded.images[rows])
    total, done = len(CORRUPTIONS) * len(SEVERITIES), 0
    found = []
    for kind in CORRUPTIONS:
        points = [(0, clean)]
        for severity in SEVERITIES:
            change = partial(corrupt, corruption=kind, severity=severity, seed=seed)
            points.append((severity, judge(_embed(model, test, places, change))))
            done += 1
            if progress:
                progress(f"corrupted images of {test.name}", done, total)
        found.append(Robustness(kind, metric, tuple(points)))
    return found


def _embed(model: Encoder, test: TestSet, places: list[int], change: Callable[..., Pixels]) -> Tensor:
    parts = []
    for start in range(0, len(places), _AT_ONCE):
        some = places[start : start + _AT_ONCE]
        images = [change(decode_image(test.source[place].image), item=place) for place in some]
        parts.append(torch.as_tensor(model.encode_image(images)).float().cpu())
    return torch.cat(parts)
