"""Everything that can be wrong with a comparison is found out here, before the first cell."""

from __future__ import annotations

import hashlib
import math
import os
import statistics
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from declip.compare.cell import SET_ASIDE, open_judged
from declip.compare.grid import CELLS, Asked, Cell, Method, batch_for, rated, recipe_of
from declip.curation.overlap import overlap
from declip.data.decoded import Images
from declip.data.loader import BatchMaker
from declip.data.sources import Source, joined
from declip.errors import InputError
from declip.evaluation.sets import TestSet
from declip.model.start import read_start
from declip.model.towers import CONTEXT_LENGTH
from declip.pairs import Data
from declip.progress import Progress
from declip.recipe import Recipe, load_recipe
from declip.training.flops import pair_flops
from declip.training.pairs import digest_of_pairs, open_pairs
from declip.training.step import pick_device

_BATCHES = 16  # that are looked at to tell how long a batch's longest text is
_GPU_RUNS = 2  # on each GPU at a time
_SEARCH_SEED = 0
_SPLITS = ("validation", "holdout", "holdout_by", "set_aside", "image", "captions", "key", "weights")
CHEAPER = 0.05  # a method whose pair costs this much more or less than the base's also runs as long as costs the same


@dataclass
class Prepared:
    """What is to be run.

    pairs: that are trained on, by fraction, without those that leave too few; batches: pairs a step, by method and
    fraction; seen: pairs that the base method sees; flops: of a pair with all its views, by method; notes: what is to
    be said, in sentences
    """

    asked: Asked
    methods: list[Method]
    extras: list[Method]
    recipes: dict[str, Recipe]
    pairs: dict[Fraction, int]
    held_out: int
    batches: dict[tuple[str, Fraction], int]
    seen: int
    flops: dict[str, float]
    judged: dict[str, int]
    digest: str
    jobs: int
    environments: list[dict[str, str]]
    notes: list[str] = field(default_factory=list)

    @property
    def base(self) -> Method:
        return self.methods[0]

    def cell(self, method: Method, fraction: Fraction, seed: int, length: float, rate: float) -> Cell:
        """length: times the base's pairs seen, in whole steps, not more"""
        batch = self.batches[method.name, fraction]
        seen = max(1, math.floor(length * self.seen / batch + 1e-6)) * batch
        changed = batch if batch != self.recipes[method.name].schedule.batch_size else None
        recipe = rated(recipe_of(self.asked, method, fraction, seed, seen, changed), rate)
        return Cell(method.name, fraction, seed, seen, rate, recipe, tuple(self.judged), self.digest)

    def lengths(self, method: Method) -> list[float]:
        """As asked for; where a pair does not cost what the base's does, also as long as the base's compute lasts."""
        equal = [length for length in self.of_equal_compute(method) if length * self.seen >= self.step(method)]
        return sorted({*self.asked.lengths, *equal})

    def of_equal_compute(self, method: Method) -> list[float]:
        """The lengths at which the base's compute lasts."""
        ratio = self.flops[method.name] / self.flops[self.base.name]
        wanted = self.asked.equal_compute and abs(ratio - 1) > CHEAPER
        return [length / ratio for length in self.asked.lengths] if wanted else []

    def step(self, method: Method) -> int:
        """Pairs of its largest step."""
        return max(size for (name, _), size in self.batches.items() if name == method.name)

    @property
    def searched(self) -> tuple[Fraction, Fraction]:
        """The smallest and the largest fraction, where learning rates are searched."""
        return min(self.pairs), max(self.pairs)

    def search(self, method: Method, fraction: Fraction, rate: float) -> Cell:
        return self.cell(method, fraction, _SEARCH_SEED, 1.0, rate)


def prepare(asked: Asked, progress: Progress | None = None) -> Prepared:
    """Raises InputError where recipes, pairs or judged sets do not do."""
    methods = asked.methods()
    extras = asked.extras(methods)
    recipes = {m.name: recipe_of(asked, m, Fraction(1), 0, 1, None) for m in [*methods, *extras]}
    base = recipes[methods[0].name]
    for name, recipe in recipes.items():
        for split in _SPLITS:
            if getattr(recipe.data, split) != getattr(base.data, split):
                raise InputError(
                    f"{name} and {methods[0].name} differ in data.{split}: all have to hold out the same pairs; say "
                    f"data.{split}=… for all."
                )
    train, held = open_pairs(base.data)
    if held is None:
        raise InputError(
            "No pairs are held out: learning rates and the weights of every run are chosen on them. Leave data.holdout "
            "above 0, or give data.validation."
        )
    notes: list[str] = []
    pairs, batches = _fractions(asked, recipes, train, notes)
    tests = open_judged(asked.judged or [SET_ASIDE], base.data)
    _check_overlap(asked, tests, joined([train, held]), base.data, notes, progress)
    schedule = load_recipe(methods[0].recipe, [*asked.changes, *methods[0].changes]).schedule
    own_length = schedule.pairs_seen or round(schedule.epochs * len(train))
    # At the largest fraction: where fewer pairs make batches smaller, one costs the same but for the texts' filling.
    most = max(pairs)
    flops = {
        name: pair_flops(read_start(recipe)[0], caption_tokens(train, recipe, batches[name, most]))
        for name, recipe in recipes.items()
    }
    jobs, environments = _slots(asked.jobs, base.engine.device)
    prepared = Prepared(
        asked,
        methods,
        extras,
        recipes,
        pairs,
        len(held),
        batches,
        asked.pairs_seen or own_length,
        flops,
        {test.name: len(test.source) for test in tests},
        _digest(train, held, tests),
        jobs,
        environments,
        notes,
    )
    _check_lengths(prepared)
    return prepared


def check_folder(out: Path) -> None:
    """Raises InputError where `out` holds anything but an earlier comparison."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / CELLS).is_dir())):
        raise InputError(f"{out} holds files that are no comparison's: give another --out.")


def caption_tokens(pairs: Source, recipe: Recipe, batch_size: int) -> int:
    """The mean length of a batch's longest text view, by some batches: all are filled up to that."""
    of_texts = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"keep_apart": "nothing"}),
            "schedule": recipe.schedule.model_copy(update={"batch_size": batch_size}),
        }
    )
    maker = BatchMaker(Images(pairs, None), of_texts, 0, recipe.model.text.context_length or CONTEXT_LENGTH)
    return round(statistics.mean(float(maker.tokens(number).shape[2]) for number in range(_BATCHES)))


def _fractions(
    asked: Asked, recipes: dict[str, Recipe], train: Source, notes: list[str]
) -> tuple[dict[Fraction, int], dict[tuple[str, Fraction], int]]:
    """How many pairs each fraction leaves, and how many of them go into a step of each method."""
    pairs: dict[Fraction, int] = {}
    batches: dict[tuple[str, Fraction], int] = {}
    data = next(iter(recipes.values())).data
    for fraction in asked.fractions:
        part = data.model_copy(update={"fraction": float(fraction)})
        count = len(train) if fraction == 1 else len(open_pairs(part)[0])
        own = {name: batch_for(recipe.schedule.batch_size, count) for name, recipe in recipes.items()}
        if None in own.values():
            notes.append(f"{fraction} of the pairs is {count}, too few for a batch: left out.")
            continue
        pairs[fraction] = count
        for name, batch in own.items():
            assert batch is not None
            batches[name, fraction] = batch
            if batch < recipes[name].schedule.batch_size:
                notes.append(f"{name}: {batch} pairs a step with {fraction} of the pairs, as there are {count}.")
    if not pairs:
        raise InputError(
            f"All fractions leave too few of the {len(train)} pairs for a batch: give more pairs or larger --fractions."
        )
    return pairs, batches


def _check_overlap(
    asked: Asked, tests: list[TestSet], train: Source, data: Data, notes: list[str], progress: Progress | None
) -> None:
    """Raises InputError where judged pictures are trained on, unless that is allowed: then it is a note."""
    name = ", ".join(asked.data)
    for test in tests:
        found = overlap("", test.name, test.source, train, progress)
        if not found.checked:
            notes.append(f"Whether {test.name} holds copies of {name} was not looked at: {found.reason}.")
        elif found.exact or found.near:
            copies = f"{found.exact} copies and {found.near} near copies of pictures in {name}"
            said = f"{test.name} holds {copies} (such as {', '.join(found.examples[:3])})"
            if not asked.allow_overlap:
                raise InputError(f"{said}: {_instead(asked, data)}, or say --allow-overlap.")
            notes.append(f"{said}; they were judged all the same.")


def _check_lengths(prepared: Prepared) -> None:
    """Raises InputError where a run would be shorter than one of its steps; of equal compute that is only a note."""
    for method in prepared.methods:
        step, least = prepared.step(method), prepared.seen * min(prepared.asked.lengths)
        if least < step:
            raise InputError(
                f"--pairs-seen {prepared.seen:,} leaves {method.name} {least:,.0f} pairs at its shortest, less than a "
                f"step of {step}: give {math.ceil(step / min(prepared.asked.lengths)):,} or more."
            )
        if not {*prepared.of_equal_compute(method)} <= {*prepared.lengths(method)}:
            prepared.notes.append(f"{method.name}: as long as costs what the base costs is less than a step: left out.")


def _instead(asked: Asked, data: Data) -> str:
    """What to do about judged pictures that are trained on."""
    if asked.judged or data.holdout_by == "picture":
        return "judge on other pairs"
    return "say data.holdout_by=picture, so that copies stay together"


def _digest(train: Source, held: Source, tests: list[TestSet]) -> str:
    """Of all pairs, so that a cell is not taken for one of other pairs."""
    digest = hashlib.sha256()
    for source in (train, held, *(test.source for test in tests)):
        digest.update(digest_of_pairs(source, images=True).encode())
    return digest.hexdigest()[:16]


def _slots(jobs: int | None, device: str) -> tuple[int, list[dict[str, str]]]:
    """How many runs at a time, and the environment of each: its GPU, or its share of the cores."""
    chosen = pick_device(device)
    if chosen.type == "cuda":
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
        gpus = visible.split(",")
        return jobs or _GPU_RUNS * len(gpus), [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = jobs or (cores if chosen.type == "cpu" else 1)
    # What the user has said wins: several comparisons side by side share the cores.
    return jobs, [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // jobs))}]
