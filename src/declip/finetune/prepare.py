"""Everything before the first step: what is asked for is opened, looked at and planned; nothing is written."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from declip.data.sources import Source, open_sources
from declip.data.sources.splits import BY_KEY
from declip.errors import InputError
from declip.evaluation.opening import open_tests
from declip.evaluation.sets import TestSet
from declip.files import check_unused
from declip.finetune.look import Look, look
from declip.finetune.start import INITS, Start, read_name
from declip.memory import GB
from declip.model.classes import classes_of
from declip.model.dual_encoder import DualEncoder
from declip.model.image_tower import TAKES_NO_SUCH_SIZE, image_widths
from declip.model.layers import blocks_of
from declip.model.parts import Part
from declip.model.recompute import has_batch_norm
from declip.model.start import first_weights, read_start
from declip.model.tuning import RESTING
from declip.progress import Progress
from declip.recipe import Recipe, load_recipe, said_in
from declip.training.checkpoint import RECIPE
from declip.training.estimate import estimate, free_memory
from declip.training.finetuning import check_enough, choose, may_be_short, passes_in, view_size_for
from declip.training.pairs import check_batch, groups_of_pictures, open_pairs
from declip.training.plan import Facts, Plan, Speed, override
from declip.training.step import pick_device

NOTES = "finetune.json"
"""In the run folder: what was found out about the pairs, and the plan with its reasons."""
TIMED_PAIRS = 32
"""Pairs of a step that only shows how long all layers take, and how much memory."""


@dataclass(frozen=True)
class Asked:
    """What the user asks for; overrides: ``path=value``; general: sets that shall not be forgotten, found in `root`."""

    model: str
    data: Sequence[str]
    overrides: Sequence[str] = ()
    out: Path | None = None
    minutes: float | None = None
    general: Sequence[str] = ()
    root: Path = Path(".")
    resume: bool = False
    began: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class Prepared:
    """What is going to be done.

    look: figures of the pairs; rows: the same for people; plan: path, value and reason of each field that is set
    held: the pairs that judge; tests: the general sets
    before: what `declip.load` opens as the model at the start, None where its towers share no space
    """

    asked: Asked
    recipe: Recipe
    look: dict[str, Any]
    rows: list[tuple[str, str]]
    plan: list[dict[str, Any]]
    held: Source | None
    tests: list[TestSet]

    @property
    def before(self) -> str | None:
        return self.recipe.model.init

    def notes(self) -> str:
        """What NOTES holds."""
        return json.dumps({"look": self.look, "rows": self.rows, "plan": self.plan}, indent=1, ensure_ascii=False)


def prepare(asked: Asked, progress: Progress | None = None) -> Prepared:
    """Open, look, plan; raises InputError for whatever is wrong."""
    own = said_in(asked.overrides)
    start = read_name(asked.model, own)
    own = {"data.train": list(asked.data), **own}
    if asked.minutes and (long := next((p for p in ("schedule.epochs", "schedule.pairs_seen") if p in own), None)):
        raise InputError(f"--minutes and {long} both say how long to train: leave one of them out.")
    if asked.resume:
        return _resumed(asked, start, own)
    if asked.out is not None:
        check_unused(asked.out, "give another --out, or --resume to go on with the run there")
    bare = _recipe(start, [], own)
    if not any(_inits(bare).values()):
        raise InputError(f"{asked.model} starts from no weights: say model.init=…, or train it with declip train.")
    return _planned(asked, start, own, bare, _tests(asked), progress)


def _planned(
    asked: Asked, start: Start, own: dict[str, Any], bare: Recipe, tests: list[TestSet], progress: Progress | None
) -> Prepared:
    said = {**start.said, **own}
    source = open_sources(bare.data.train, bare.data)
    check_enough(len(source))
    splits, by_picture = not bare.data.validation and bare.data.holdout > 0, len(source) <= BY_KEY
    by = said.get("data.holdout_by", "picture" if by_picture else "key")
    groups = groups_of_pictures(source, bare.data, progress) if by_picture else None
    train, held = open_pairs(bare.data.model_copy(update={"holdout_by": by}))
    facts, found = _facts_of_weights(bare, source, groups, progress)
    facts = replace(
        facts,
        pairs=len(train),
        held_out=len(held) if held is not None else 0,
        splits=splits,
        by_picture=by_picture,
        said=said,
        minutes=asked.minutes,
    )
    recipe = _recipe(start, choose(facts), own)
    check_batch(recipe, train)
    if may_be_short(facts) or recipe.model.image.tune not in RESTING:
        seconds, pair_bytes, left = _small_steps(recipe)
        facts = replace(facts, pair_bytes=pair_bytes, free_bytes=left, spent=time.perf_counter() - asked.began)
        facts = replace(facts, passes=passes_in(facts, seconds) if may_be_short(facts) else None)
    if asked.minutes:
        speed = _speed(_recipe(start, choose(facts), own), progress)
        facts = replace(facts, speed=speed, spent=time.perf_counter() - asked.began)
    plan = choose(facts)
    recipe = _recipe(start, plan, own)
    rows = [asdict(choice) for choice in plan]
    rows += [
        {"path": path, "value": value, "reason": "as you say"}
        for path, value in said_in(asked.overrides).items()
        if path != "data.train"
    ]
    return Prepared(
        asked, recipe, {**found.as_json(), "held_out": facts.held_out}, found.rows(facts.held_out), rows, held, tests
    )


def _recipe(start: Start, plan: Plan, own: dict[str, Any]) -> Recipe:
    """The recipe with the rules' choices, what the user says, and what MODEL is."""
    name = [] if "name" in start.said else ["name=finetuned"]
    given = [override(path, value) for path, value in own.items()]
    return load_recipe(start.recipe, [*name, *(choice.override for choice in plan), *given, *start.overrides])


def _facts_of_weights(bare: Recipe, source: Source, groups: Any, progress: Progress | None) -> tuple[Facts, Look]:
    """What the weights say, and a look at the pairs through the towers' eyes; raises InputError where they do not fit.

    The facts lack how many pairs there are.
    """
    recipe, weights = read_start(bare)
    model = DualEncoder(recipe)
    first_weights(weights, model.clip)
    found = look(source, groups, model.tokenizer, model.image_size, recipe.data.workers, progress)
    towers = {"image": weights.image, "text": weights.text}
    projected = any(tower is not None and tower.projected_to for tower in towers.values())
    facts = Facts(
        joint=weights.whole is not None,
        pairs=0,
        held_out=0,
        captions=found.captions,
        sides=found.sides,
        random=tuple(part for part, tower in towers.items() if tower is None),
        layers=_layers(model),
        image_size=model.image_size,
        any_size=_takes(model, view_size_for(model.image_size)),
        batch_norms=has_batch_norm(model.clip.visual),
        classes=classes_of(model, weights),
        views_alike=bare.views_alike,
        embed_dim=recipe.model.embed_dim if projected else None,
    )
    return facts, found


def _takes(model: DualEncoder, size: int) -> bool:
    """Whether the image tower takes images of that side too."""
    try:
        image_widths(model.clip, size)
    except TAKES_NO_SUCH_SIZE:
        return False
    return True


def _layers(model: DualEncoder) -> dict[str, int]:
    """Of each tower of which they are known."""
    found: dict[str, int] = {}
    parts: tuple[Part, Part] = ("image", "text")
    for part in parts:
        with contextlib.suppress(InputError):
            found[part] = len(blocks_of(model.clip, part))
    return found


def _speed(recipe: Recipe, progress: Progress | None) -> Speed:
    found = estimate(recipe, keep=True, progress=progress)  # what is kept may take longer than all steps
    gc.collect()  # the model that was timed
    return Speed(found["seconds_per_step"], found["seconds_per_score"], found["batch_size"])


def _small_steps(recipe: Recipe) -> tuple[float, float, int | None]:
    """Seconds and bytes that a pair takes, from a few small steps, and the bytes that are free without them."""
    small = recipe.schedule.model_copy(update={"batch_size": min(TIMED_PAIRS, recipe.schedule.batch_size)})
    alone = recipe.data.model_copy(update={"validation": [], "holdout": 0.0})
    unmixed = recipe.evaluation.model_copy(update={"interpolate": False})  # which wants held-out pairs
    few = recipe.model_copy(update={"schedule": small, "data": alone, "evaluation": unmixed})
    found = estimate(few, timed=2)  # the rules ask for a factor, and all layers of a slow machine take long
    gc.collect()
    pair_bytes = GB * found["memory_gb"]["activations"] / small.batch_size
    return 1 / found["samples_per_second"], pair_bytes, free_memory(pick_device(recipe.engine.device))


def _tests(asked: Asked) -> list[TestSet]:
    """The general sets, for retrieval and zero-shot."""
    if not asked.general:
        return []
    tests = open_tests(list(asked.general), None, root=asked.root)
    found = []
    for test in tests:
        tasks = None if test.tasks is None else tuple(task for task in test.tasks if task != "linear-probe")
        if tasks == ():
            raise InputError(f"{test.name} is for linear probes alone: --general takes retrieval and zero-shot sets.")
        found.append(replace(test, tasks=tasks, train=None, validation=None))
    return found


def _resumed(asked: Asked, start: Start, own: dict[str, Any]) -> Prepared:
    """What a run in the folder was going to do; the rules are not asked again."""
    out = asked.out or Path()
    if not (out / RECIPE).is_file() or not (out / NOTES).is_file():
        raise InputError(f"{out} holds no run of declip finetune to resume: leave out --resume to start one there.")
    stored = load_recipe(out / RECIPE)
    inits = {**start.inits, **{path: own.pop(path) for path in INITS if path in own}}
    there = _inits(stored)
    for path, value in inits.items():
        if there[path] != value:
            raise InputError(
                f"{out} started from {path} = {there[path]!r}, not {value!r}: name the same model to resume it."
            )
    recipe = load_recipe(out / RECIPE, [override(path, value) for path, value in own.items()])
    tests = _tests(asked)
    _, held = open_pairs(recipe.data)
    notes = json.loads((out / NOTES).read_text("utf-8"))
    return Prepared(asked, recipe, notes["look"], [tuple(row) for row in notes["rows"]], notes["plan"], held, tests)


def _inits(recipe: Recipe) -> dict[str, str | None]:
    model = recipe.model
    return dict(zip(INITS, (model.init, model.image.init, model.text.init), strict=True))
