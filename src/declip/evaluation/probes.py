"""Linear probes of a model: from labelled pairs to features, and from a probe's answers to figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from declip.errors import InputError
from declip.evaluation.embedding import Embedded, Encoder, embed_source
from declip.evaluation.judged import Judged
from declip.evaluation.linear_probe import Features, ProbeResult, few_shot, linear_probe
from declip.evaluation.sets import TestSet
from declip.evaluation.statistics import over_seeds
from declip.evaluation.tasks import Labelled, classification, labelled
from declip.progress import Progress


@dataclass(frozen=True)
class ProbeSets:
    """Features of the images that can be read, with one numbering of classes; `of` also knows those that cannot."""

    train: Features
    validation: Features | None
    test: Features
    of: Labelled


def probe_sets(
    model: Encoder, test: TestSet, embedded: Embedded, known: dict[int, Embedded], progress: Progress | None
) -> ProbeSets:
    """Embed what the probe learns from. Features are the normalised embeddings that are searched with too.

    known: what the model has embedded of sources, by their ids; what is embedded here is added.
    Raises InputError where there is nothing to learn from, or the model compares tokens.
    """
    if test.train is None:
        raise InputError(f"A linear probe on {test.name} has nothing to learn from: give labelled pairs with --train.")
    if embedded.images.ndim != 2:
        raise InputError(f"{model.name} compares tokens: an image has no one embedding that a probe could learn from.")
    parts = [part for part in (test.train, test.validation) if part is not None]
    for part in parts:
        if id(part.source) not in known:
            known[id(part.source)] = embed_source(model, part.source, part.name, progress)
    learnt = [(part, known[id(part.source)]) for part in parts]
    classes = test.classes
    if classes is None:  # labels that are names: whatever either set has
        asked, taught = _labels([embedded]), _labels([one for _, one in learnt])
        if not asked & taught:
            raise InputError(
                f"{test.train.name} has none of the classes of {test.name}: give labelled pairs of the same classes "
                "with --train."
            )
        classes = tuple(sorted(asked | taught))
    of = labelled(replace(test, classes=classes), embedded)
    train, *validation = (_features(one, labelled(replace(part, classes=classes), one)) for part, one in learnt)
    return ProbeSets(train, validation[0] if validation else None, _features(embedded, of), of)


def _labels(sets: Sequence[Embedded]) -> set[str]:
    return {label for one in sets for label in one.labels if label is not None}


def _features(embedded: Embedded, of: Labelled) -> Features:
    return Features(embedded.images[of.rows[of.readable]], of.classes[of.readable])


def probe(sets: ProbeSets, judged: Judged, seed: int) -> Tensor:
    """A probe on all that there is to learn from; returns logits [readable images, classes]."""
    found = linear_probe(
        sets.train, sets.test, sets.validation, classes=len(sets.of.names), seed=seed, device=_device()
    )
    classification(sets.of, found.ranks, judged)
    judged.settings = {"strength": found.strength, "learnt_from": _learnt_from(sets), "converged": found.converged}
    return found.scores


def few_shot_probes(sets: ProbeSets, judged: Judged, shots: Sequence[int]) -> list[Judged]:
    """Probes on k images of each class: the mean over the draws, with Student's interval of it.

    The setting `top1_deviation` has the standard deviation of single draws.
    """
    rows = []
    for found in few_shot(
        sets.train, sets.test, sets.validation, classes=len(sets.of.names), shots=shots, device=_device()
    ):
        runs = [_judged(sets.of, run, judged) for run in found.runs]
        figures = {name: over_seeds([run.metrics[name] for run in runs]) for name in runs[0].metrics}
        rows.append(
            replace(
                runs[0],
                metrics={name: figure.mean for name, figure in figures.items()},
                intervals={name: (figure.low, figure.high) for name, figure in figures.items()},
                ranks={},
                settings={"shots": found.shots, "seeds": len(runs), "top1_deviation": figures["top1"].deviation},
            )
        )
    return rows


def _judged(of: Labelled, run: ProbeResult, like: Judged) -> Judged:
    judged = Judged(like.model, like.data, like.task, broken=like.broken)
    classification(of, run.ranks, judged)
    return judged


def _learnt_from(sets: ProbeSets) -> int:
    return len(sets.train) + (len(sets.validation) if sets.validation else 0)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
