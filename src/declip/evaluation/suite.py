"""Models side by side on sets of pairs: each model embeds each set once, then is asked all that the set allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from declip.evaluation import Progress
from declip.evaluation.certainty import add_intervals, compare, same_queries
from declip.evaluation.details import Details
from declip.evaluation.embedding import Embedded, Encoder, embed_source
from declip.evaluation.extracts import logit_scale, show_classification, show_health, show_retrieval
from declip.evaluation.judged import Comparison, Judged
from declip.evaluation.probes import few_shot_probes, probe, probe_sets
from declip.evaluation.robustness import of_retrieval, of_zero_shot
from declip.evaluation.sets import TestSet
from declip.evaluation.tasks import (
    embed_captions,
    labelled,
    possible_tasks,
    retrieval,
    zero_shot,
    zero_shot_classes,
)
from declip.model.token_similarity import similarity

UNSEEN = -1e4
"""Logit of a class that a probe has seen nothing of, whose own is minus infinity."""


@dataclass(frozen=True)
class Asked:
    """What is asked of every model.

    tasks: None for all that a set allows; templates: None for the set's own; shots: examples a class of few-shot probes
    details: also gather what a report shows; robustness: also judge corrupted pictures
    """

    tasks: Sequence[str] | None = None
    templates: Sequence[str] | None = None
    shots: Sequence[int] = ()
    seed: int = 0
    details: bool = False
    robustness: bool = False


@dataclass
class Evaluation:
    """All that was found: by model, set and task; between models; and, where asked for, what a report shows."""

    results: list[Judged] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    details: list[Details] = field(default_factory=list)


def evaluate_models(
    models: Sequence[Callable[[], Encoder]], tests: Sequence[TestSet], asked: Asked, progress: Progress | None = None
) -> Evaluation:
    """Judge each model on each set; of `models`, which open them, one is held at a time."""
    found = Evaluation()
    for open_model in models:
        model = open_model()
        for test in tests:
            _judge(model, test, asked, found, progress)
    metrics = {test.name: test.metric for test in tests}
    for ours, theirs in combinations(found.results, 2):
        if ours.model != theirs.model and same_queries(ours, theirs):
            found.comparisons += compare(ours, theirs, metrics[ours.data], asked.seed)
    return found


def _judge(model: Encoder, test: TestSet, asked: Asked, found: Evaluation, progress: Progress | None) -> None:
    """One model on one set, task by task."""
    embedded = embed_source(model, test.source, test.name, progress)
    for task in asked.tasks or possible_tasks(test, embedded):
        judged = Judged(model.name, test.name, task, broken=embedded.broken)
        details = Details(model.name, test.name, task)
        if task == "retrieval":
            _retrieval(model, test, embedded, judged, details, asked, progress)
        elif task == "zero-shot":
            _zero_shot(model, test, embedded, judged, details, asked, progress)
        else:
            _probe(model, test, embedded, judged, details, asked, found, progress)
        add_intervals(judged, asked.seed)
        found.results.append(judged)
        found.details += [details] * asked.details


def _retrieval(
    model: Encoder,
    test: TestSet,
    embedded: Embedded,
    judged: Judged,
    details: Details,
    asked: Asked,
    progress: Progress | None,
) -> None:
    texts = embed_captions(model, test, embedded, progress)
    retrieval(test, embedded, texts, judged)
    if asked.details:
        show_retrieval(details, test, embedded, texts, judged.ranks)
        show_health(details, embedded.images[texts.captioned], texts.embeddings[texts.rows], texts.image)
    if asked.robustness:
        details.robustness = of_retrieval(model, test, embedded, texts, asked.seed, progress)


def _zero_shot(
    model: Encoder,
    test: TestSet,
    embedded: Embedded,
    judged: Judged,
    details: Details,
    asked: Asked,
    progress: Progress | None,
) -> None:
    of = labelled(test, embedded)
    classes = zero_shot_classes(model, test, of.names, asked.templates, progress)
    zero_shot(embedded, of, classes, judged)
    readable = of.rows >= 0
    images = embedded.images[of.rows[readable]]
    if asked.details:
        show_classification(details, test, of, logit_scale(model) * similarity(images, classes), asked.seed)
        show_health(details, images)
    if asked.robustness:
        details.robustness = of_zero_shot(model, test, embedded, of, classes, asked.seed, progress)


def _probe(
    model: Encoder,
    test: TestSet,
    embedded: Embedded,
    judged: Judged,
    details: Details,
    asked: Asked,
    found: Evaluation,
    progress: Progress | None,
) -> None:
    """A probe on all that there is to learn from; those of few shots are results of their own."""
    sets = probe_sets(model, test, embedded, progress)
    if progress:
        progress(f"probes of {test.name}", 0, 1)
    logits = probe(sets, judged, asked.seed).clamp(min=UNSEEN)
    if asked.details:
        show_classification(details, test, sets.of, logits, asked.seed)
    if asked.shots:
        found.results += few_shot_probes(sets, judged, asked.shots)
    if progress:
        progress(f"probes of {test.name}", 1, 1)
