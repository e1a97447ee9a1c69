"""What a model can do before and after, on the held-out pairs and on sets that shall not be forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb
from typing import Any

import numpy as np
import torch

from declip.data.sources import Source
from declip.evaluation.certainty import add_intervals, compare, same_queries
from declip.evaluation.embedding import Embedded, embed_source
from declip.evaluation.judged import Judged
from declip.evaluation.retrieval import RECALL_AT
from declip.evaluation.sets import TestSet
from declip.evaluation.suite import Asked, evaluate_models
from declip.evaluation.tasks import Texts, embed_captions, retrieval
from declip.model.pretrained import LoadedModel
from declip.model.token_similarity import similarity
from declip.progress import Progress

HELD_OUT = "held-out pairs"
QUERIES, HITS = 12, 5


@dataclass(frozen=True)
class Asking:
    """A held-out caption, and the places of the pictures that a model finds for it; right: whether each belongs."""

    text: str
    places: tuple[int, ...]
    right: tuple[bool, ...]


@dataclass
class Verdict:
    """One model: what was judged, the held-out pairs first, and a few captions with what it finds for them."""

    results: list[Judged] = field(default_factory=list)
    asked: list[Asking] = field(default_factory=list)


@dataclass(frozen=True)
class Change:
    """One set and task before and after, in percent.

    before: None of a model whose towers share no space yet; chance: what guessing gives
    differences: after less before, of recall at 1 or accuracy: (metric, difference, interval, p)
    """

    data: str
    task: str
    items: int
    before: dict[str, float] | None
    chance: dict[str, float]
    after: dict[str, float]
    differences: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


def judge(model: LoadedModel, held: Source | None, tests: Sequence[TestSet], progress: Progress | None) -> Verdict:
    """Retrieval among the held-out pairs, and whatever each of the sets allows."""
    verdict = Verdict()
    if held is not None:
        test = TestSet(HELD_OUT, held)
        embedded = embed_source(model, held, HELD_OUT, progress)
        texts = embed_captions(model, test, embedded, progress)
        judged = Judged(model.name, HELD_OUT, "retrieval", broken=embedded.broken)
        retrieval(test, embedded, texts, judged)
        add_intervals(judged)
        verdict.results.append(judged)
        verdict.asked = _ask(embedded, texts)
    if tests:
        verdict.results += evaluate_models([model], tests, Asked(), progress).results
    return verdict


def _ask(embedded: Embedded, texts: Texts) -> list[Asking]:
    """The first caption of a few pictures, always the same ones; a picture with an equal caption is right too."""
    images, places = embedded.images[texts.captioned], embedded.rows[texts.captioned].tolist()
    chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:QUERIES])
    found = []
    for image in chosen.tolist():
        row = int((texts.image == image).nonzero()[0, 0])
        text = texts.texts[row]
        scores = similarity(texts.embeddings[texts.rows[row]][None], images)[0]
        best = scores.topk(min(HITS, len(images))).indices.tolist()
        right = tuple(text in embedded.captions[places[hit]] for hit in best)
        found.append(Asking(text, tuple(places[hit] for hit in best), right))
    return found


def changes(before: Verdict | None, after: Verdict, tests: Sequence[TestSet]) -> list[Change]:
    """Both verdicts side by side."""
    known = {test.name: test for test in tests}
    found = []
    for number, judged in enumerate(after.results):
        test = known.get(judged.data)
        first = before.results[number] if before is not None else None
        differences = []
        if first is not None and same_queries(judged, first):
            differences = [
                {"metric": one.metric, "difference": one.difference, "interval": list(one.interval), "p": one.p}
                for one in compare(judged, first, test.metric if test else "top1")
            ]
        found.append(
            Change(
                judged.data,
                judged.task,
                judged.items,
                first.metrics if first is not None else None,
                chance(judged, test.folds if test else 1),
                judged.metrics,
                differences,
            )
        )
    return found


def chance(judged: Judged, folds: int = 1) -> dict[str, float]:
    """What guessing gives, in percent: recalls both ways, or top-1 and top-5.

    Of an image with c of the T captions, one is among k drawn ones with probability 1 - C(T - c, k) / C(T, k).
    folds: equal parts that retrieval is judged within
    """
    if judged.choices:
        return {f"top{k}": 100.0 * min(1.0, k / judged.choices) for k in (1, 5) if f"top{k}" in judged.metrics}
    images, texts = judged.items / folds, len(judged.asked) // folds
    own = torch.bincount(judged.asked)
    own, count = torch.unique(own[own > 0], return_counts=True)
    found = {f"text_to_image_r{k}": 100.0 * min(1.0, k / images) for k in RECALL_AT}
    for k in RECALL_AT:
        missed = [comb(texts - c, k) / comb(texts, k) if k <= texts else 0.0 for c in own.tolist()]
        share = sum(miss * n for miss, n in zip(missed, count.tolist(), strict=True)) / int(count.sum())
        found[f"image_to_text_r{k}"] = 100.0 * (1 - share)
    return found
