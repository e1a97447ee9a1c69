"""Models side by side on sets of pairs: each model embeds each set once, then is asked all that the set allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from declip.evaluation.certainty import add_intervals, compare, same_queries
from declip.evaluation.details import Details
from declip.evaluation.embedding import Embedded, Encoder, embed_source
from declip.evaluation.extracts import logit_scale, show_classification, show_health, show_retrieval
from declip.evaluation.judged import Comparison, Judged
from declip.evaluation.opening import openers
from declip.evaluation.probes import few_shot_probes, probe, probe_sets
from declip.evaluation.robustness import of_retrieval, of_zero_shot
from declip.evaluation.seeds import over_runs, same_but_for_seed
from declip.evaluation.sets import TestSet
from declip.evaluation.tasks import (
    embed_captions,
    labelled,
    possible_tasks,
    rerank_retrieval,
    retrieval,
    zero_shot,
    zero_shot_classes,
)
from declip.model.prompts import resolve_templates
from declip.model.token_similarity import similarity
from declip.progress import Progress

UNSEEN = -1e4
"""Logit of a class that a probe has seen nothing of, whose own is minus infinity."""


@dataclass(frozen=True)
class Asked:
    """What is asked of every model. Raises InputError where a template has no {}.

    tasks: None for all that a set allows; templates: None for the set's own; shots: examples a class of few-shot probes
    details: also gather what a report shows; robustness: also judge corrupted pictures
    rerank: so many first hits of each query are put in order by models that look into images for what a text says
    """

    tasks: Sequence[str] | None = None
    templates: Sequence[str] | None = None
    shots: Sequence[int] = ()
    seed: int = 0
    details: bool = False
    robustness: bool = False
    rerank: int = 0

    def __post_init__(self) -> None:
        resolve_templates(self.templates)  # before anything is opened


@dataclass
class Evaluation:
    """All that was found: by model, set and task; between models; where asked for, what a report shows; and what was
    left out, in sentences.
    """

    results: list[Judged] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    details: list[Details] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> dict[str, Any]:
        """What `declip.evaluate` returns."""
        return {
            "model": self.results[0].model,
            "results": [judged.row() for judged in self.results],
            "comparisons": [comparison.row() for comparison in self.comparisons],
            **({"notes": list(dict.fromkeys(self.notes))} if self.notes else {}),  # each model has its own
        }


def evaluate_models(
    models: Sequence[Any],
    tests: Sequence[TestSet],
    asked: Asked,
    progress: Progress | None = None,
    precision: str = "float32",
) -> Evaluation:
    """Judge each model on each set.

    models: as such, or what `declip.load` takes; one of these is held at a time. Runs that differ in their seed alone
    also give their mean. precision: of the image towers that are opened here.
    """
    found, open_models, groups = Evaluation(), openers(models, precision), same_but_for_seed(models)
    for open_model in open_models:
        model = open_model()
        learnt: dict[int, Embedded] = {}  # sets may share what their probes learn from
        for done, test in enumerate(tests, 1):
            _judge(model, test, asked, found, learnt, progress)
            needed = {id(part.source) for later in tests[done:] for part in (later.train, later.validation) if part}
            learnt = {source: embedded for source, embedded in learnt.items() if source in needed}
    metrics = {test.name: test.metric for test in tests}
    for ours, theirs in combinations(found.results, 2):
        if ours.model != theirs.model and same_queries(ours, theirs):
            found.comparisons += compare(ours, theirs, metrics[ours.data], asked.seed)
    found.results += over_runs(found.results, groups)
    return found


def _judge(
    model: Encoder,
    test: TestSet,
    asked: Asked,
    found: Evaluation,
    learnt: dict[int, Embedded],
    progress: Progress | None,
) -> None:
    """One model on one set, task by task."""
    embedded = embed_source(model, test.source, test.name, progress)
    tasks = asked.tasks or possible_tasks(test, embedded)
    if test.train is not None and "zero-shot" in tasks and not asked.tasks and "linear-probe" not in tasks:
        found.notes.append(f"{test.name} is not probed: {test.train.name} has none of its classes.")
    for task in tasks:
        judged = Judged(model.name, test.name, task, broken=embedded.broken)
        judging = _Judging(model, test, embedded, asked, progress, judged, Details(model.name, test.name, task))
        if task == "retrieval":
            judging.retrieval()
        elif task == "zero-shot":
            judging.zero_shot()
        else:
            found.results += judging.probe(learnt)
        add_intervals(judged, asked.seed)
        found.results.append(judged)
        found.details += [judging.details] * asked.details


@dataclass(frozen=True)
class _Judging:
    """One model on one set in one task: fills in `judged` and, where they are asked for, `details`."""

    model: Encoder
    test: TestSet
    embedded: Embedded
    asked: Asked
    progress: Progress | None
    judged: Judged
    details: Details

    def retrieval(self) -> None:
        texts = embed_captions(self.model, self.test, self.embedded, self.progress)
        retrieval(self.test, self.embedded, texts, self.judged)
        if self.asked.rerank:
            rerank_retrieval(self.model, self.test, self.embedded, texts, self.judged, self.asked.rerank, self.progress)
        if self.asked.details:
            show_retrieval(self.details, self.test, self.embedded, texts, self.judged.ranks)
            images, captions = self.embedded.images[texts.captioned], texts.embeddings[texts.rows]
            show_health(self.details, images, captions, texts.image)
        if self.asked.robustness:
            self.details.robustness = of_retrieval(
                self.model, self.test, self.embedded, texts, self.asked.seed, self.progress
            )

    def zero_shot(self) -> None:
        of = labelled(self.test, self.embedded)
        classes = zero_shot_classes(self.model, self.test, of.names, self.asked.templates, self.progress)
        zero_shot(self.embedded, of, classes, self.judged)
        if self.asked.details:
            images = self.embedded.images[of.rows[of.readable]]
            logits = logit_scale(self.model) * similarity(images, classes)
            show_classification(self.details, self.test, of, logits, self.asked.seed)
            show_health(self.details, images)
        if self.asked.robustness:
            self.details.robustness = of_zero_shot(
                self.model, self.test, self.embedded, of, classes, self.asked.seed, self.progress
            )

    def probe(self, learnt: dict[int, Embedded]) -> list[Judged]:
        """A probe on all that there is to learn from; returns those of few shots, which are results of their own."""
        sets = probe_sets(self.model, self.test, self.embedded, learnt, self.progress)
        if self.progress:
            self.progress(f"probes of {self.test.name}", 0, 1)
        logits = probe(sets, self.judged, self.asked.seed).clamp(min=UNSEEN)
        if self.asked.details:
            show_classification(self.details, self.test, sets.of, logits, self.asked.seed)
        few = few_shot_probes(sets, self.judged, self.asked.shots)
        if self.progress:
            self.progress(f"probes of {self.test.name}", 1, 1)
        return few
