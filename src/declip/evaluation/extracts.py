"""The extracts that a report shows: which classes are confused, which pictures were found, how sure the model was."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from declip.data.sources import BrokenPair, Source
from declip.evaluation.calibration import calibrate, reliability
from declip.evaluation.details import Calibration, ClassScore, Confusion, Details, Example, Found
from declip.evaluation.embedding import Embedded, Encoder
from declip.evaluation.health import effective_rank, embedding_health, uniformity
from declip.evaluation.sets import TestSet
from declip.evaluation.tasks import Labelled, Texts
from declip.model.token_similarity import similarity

CONFUSIONS = EXAMPLES = 12
QUERIES = 6  # each way
HITS = 5


def show_classification(details: Details, test: TestSet, of: Labelled, logits: Tensor, seed: int = 0) -> None:
    """Fill in what is shown of a classification; logits: [readable images, classes]."""
    truth, places = of.classes[of.readable], of.sources[of.readable]
    confidence, answer = logits.softmax(1).max(1)
    right = answer == truth
    details.classes = _classes(of, right)
    details.confusions = _confusions(of.names, truth, answer)
    order = confidence.argsort(descending=True, stable=True)
    shown: dict[bool, list[Example]] = {True: [], False: []}
    for place in order.tolist():
        hits = shown[bool(right[place])]
        if len(hits) < EXAMPLES and (image := _image(test.source, int(places[place]))):
            hits.append(Example(image, of.names[truth[place]], of.names[answer[place]], float(confidence[place])))
        if all(len(found) == EXAMPLES for found in shown.values()):
            break
    details.best, details.worst = shown[True], shown[False]
    if len(truth) >= 2:
        found = calibrate(logits, truth, seed=seed)
        bins = [(b.confidence, b.accuracy, b.items / len(truth)) for b in reliability(confidence, right)]
        details.calibration = Calibration(tuple(bins), 100 * found.error, 100 * found.error_after, found.temperature)


def _classes(of: Labelled, right: Tensor) -> list[ClassScore]:
    """Images that cannot be read count as wrong, as in the figures."""
    hits = torch.zeros(len(of.classes), dtype=torch.float64)
    hits[of.readable] = right.double()
    items = torch.bincount(of.classes, minlength=len(of.names)).tolist()
    correct = torch.bincount(of.classes, weights=hits, minlength=len(of.names)).tolist()
    return [
        ClassScore(name, count, 100 * hit / count)
        for name, count, hit in zip(of.names, items, correct, strict=True)
        if count
    ]


def _confusions(names: Sequence[str], truth: Tensor, answer: Tensor) -> list[Confusion]:
    wrong = truth != answer
    items = torch.bincount(truth, minlength=len(names)).tolist()
    pairs, counts = torch.unique(torch.stack([truth[wrong], answer[wrong]]), dim=1, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:CONFUSIONS].tolist()
    return [Confusion(names[t], names[a], int(counts[o]), items[t]) for o in order for t, a in [pairs[:, o].tolist()]]


def show_retrieval(details: Details, test: TestSet, embedded: Embedded, texts: Texts, ranks: dict[str, Tensor]) -> None:
    """A few captions and images, the same ones for every model, and what is found for each among all pairs."""
    images, owner = embedded.images[texts.captioned], texts.image
    places = embedded.rows[texts.captioned].tolist()
    for query in _spread(len(texts.texts)):
        scores = similarity(texts.embeddings[texts.rows[query]][None], images)[0]
        best = scores.topk(min(HITS, len(images))).indices.tolist()
        hits = [_image(test.source, places[hit]) for hit in best]
        right = tuple(hit == int(owner[query]) for hit in best)
        if all(hits):
            rank = 1 + int(ranks["text_to_image"][query])
            details.retrieved.append(Found(texts.texts[query], tuple(map(bytes, hits)), right, rank))
    queries = torch.unique(owner)
    wordings = dict(zip(texts.rows.tolist(), texts.texts, strict=True))
    for query in _spread(len(queries)):
        scores = similarity(images[queries[query]][None], texts.embeddings)[0]
        # Equal captions are one here: it is right where it is one of the image's own.
        own = set(texts.rows[owner == queries[query]].tolist())
        best = scores.topk(min(HITS, len(scores))).indices.tolist()
        if image := _image(test.source, places[int(queries[query])]):
            rank = 1 + int(ranks["image_to_text"][query])
            found = Found(image, tuple(wordings[hit] for hit in best), tuple(hit in own for hit in best), rank)
            details.retrieved.append(found)


def _spread(count: int) -> list[int]:
    """A few of so many, at random, always the same."""
    chosen = np.random.default_rng(0).permutation(count)[:QUERIES]
    return sorted(chosen.tolist())


def _image(source: Source, place: int) -> bytes:
    try:
        return source[place].image
    except BrokenPair:  # it was there when it was embedded
        return b""


def show_health(
    details: Details, images: Tensor, texts: Tensor | None = None, image_of_text: Tensor | None = None
) -> None:
    """How the embeddings lie; nothing of a model that compares tokens, whose embedding an item has none."""
    if images.ndim != 2:
        return
    if texts is None or image_of_text is None:
        details.health = {"image_uniformity": uniformity(images), "image_effective_rank": effective_rank(images)}
    else:
        health = embedding_health(images, texts, image_of_text)
        details.health = {name: value for name, value in health.items() if math.isfinite(value)}


def logit_scale(model: Encoder) -> float:
    """What a model multiplies similarities with before the softmax; CLIP's own where it does not say."""
    return float(getattr(model, "logit_scale", 100.0))
