"""What a comparison runs: methods × fractions × seeds × lengths. A cell is known by the hash of its recipe."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from declip.engine import Engine
from declip.errors import InputError
from declip.recipe import Recipe, load_recipe, said_in, to_toml

FORMAT = 1
"""Of what a cell's file says; cells of another format are run again."""

CELLS = "cells"
"""The folder of what cells have found, and of those that run."""

SMALLEST_BATCH = 8
RATES = ("lr", "image_lr", "text_lr", "projection_lr", "head_lr", "logit_scale_lr")
_BY_GRID = {
    "data.train": "--data",
    "data.fraction": "--fractions",
    "data.fraction_seed": "--seeds",
    "data.set_aside": "--aside",
    "seed": "--seeds",
    "schedule.pairs_seen": "--pairs-seen",
    "schedule.epochs": "--pairs-seen",
}
_ALIGNING = ("contrastive", "sigmoid", "token_wise")


@dataclass(frozen=True)
class Method:
    """A line of the report: a recipe and what is changed of it.

    of: the method whose learning rates it takes, where it is a variant of that
    """

    name: str
    recipe: str
    changes: tuple[str, ...] = ()
    of: str | None = None


@dataclass(frozen=True)
class Cell:
    """One training run and its judgement.

    seen: pairs that it sees at most; rate: factor on its recipe's learning rates; judged: names of the sets; digest: of
    the pairs that it learns from and is judged on
    """

    method: str
    fraction: Fraction
    seed: int
    seen: int
    rate: float
    recipe: Recipe
    judged: tuple[str, ...]
    digest: str

    @cached_property
    def key(self) -> str:
        """Hash of all that the result depends on: not of devices, threads and loader processes."""
        engine = Engine(precision=self.recipe.engine.precision)
        data = self.recipe.data.model_copy(update={"workers": 0, "cache_gb": 1.0})
        recipe = self.recipe.model_copy(update={"engine": engine, "data": data, "name": "", "about": ""})
        text = "\0".join([str(FORMAT), to_toml(recipe), *self.judged, self.digest])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def file(self) -> str:
        """Where its result is kept, in the folder of the comparison."""
        return f"{CELLS}/{self.key}.json"

    def described(self) -> dict[str, Any]:
        """What tells it from the other cells of a comparison, for JSON."""
        return {"method": self.method, "fraction": str(self.fraction), "seed": self.seed, "rate": self.rate}


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    judged: sets to judge on; none: `aside`, a share of the pairs that no run sees
    recipes: of the methods, by name or file; changes: of all of them; own: of one, by its name; base: who the others
    are measured against; rates: factors on the recipes' learning rates to choose from; lengths: of the runs, times
    `pairs_seen`; equal_compute: also run other methods for as long as costs what the base costs;
    ablate: recipes whose terms are left out one by one; variants: (recipe, changes) to judge beside it;
    jobs: runs at a time
    """

    recipes: tuple[str, ...]
    data: tuple[str, ...]
    judged: tuple[str, ...]
    out: Path
    base: str | None = None
    changes: tuple[str, ...] = ()
    own: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fractions: tuple[Fraction, ...] = tuple(Fraction(1, 2**n) for n in range(5))
    seeds: int = 3
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    lengths: tuple[float, ...] = (1.0,)
    pairs_seen: int | None = None
    ablate: tuple[str, ...] = ()
    variants: tuple[tuple[str, tuple[str, ...]], ...] = ()
    aside: float = 0.1
    equal_compute: bool = True
    jobs: int | None = None
    allow_overlap: bool = False

    def methods(self) -> list[Method]:
        """The methods, the base first. Raises InputError where one is named twice or is not there."""
        found = [Method(_name(recipe), recipe, self.own.get(_name(recipe), ())) for recipe in self.recipes]
        names = [method.name for method in found]
        if doubled := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"Two recipes are called {doubled!r}: give the TOML files names of their own.")
        if odd := next((name for name in self.own if name not in names), None):
            raise InputError(f"{odd}:{self.own[odd][0]} changes a recipe that is not compared: name one of {names}.")
        base = _name(self.base or self.recipes[0])
        if base not in names:
            raise InputError(f"--base {base} is not among the recipes compared: name one of {', '.join(names)}.")
        of_some = [*self.own.values(), *(changes for _, changes in self.variants)]
        for change in [*self.changes, *(change for own in of_some for change in own)]:
            for path in said_in([change]):
                if path in _BY_GRID:
                    raise InputError(f"{change!r}: the grid sets {path} itself; use {_BY_GRID[path]}.")
        return sorted(found, key=lambda method: method.name != base)

    def extras(self, methods: Sequence[Method]) -> list[Method]:
        """The rows of the ablation: of each recipe named every term off and alone, then the variants."""
        by_name = {method.name: method for method in methods}
        found = []
        for name in map(_name, self.ablate):
            method = _compared(by_name, name, "--ablate")
            recipe = load_recipe(method.recipe, [*self.changes, *method.changes])
            rows = term_changes(recipe)
            if not rows:
                raise InputError(f"--ablate {name}: it has one term, which cannot be left out; leave --ablate out.")
            found += [
                replace(method, name=f"{name} {what}", changes=(*method.changes, *changes), of=name)
                for what, changes in rows
            ]
        for recipe_name, changes in self.variants:
            method = _compared(by_name, _name(recipe_name), "--variant")
            what = " ".join(changes)
            found.append(
                replace(method, name=f"{method.name} {what}", changes=(*method.changes, *changes), of=method.name)
            )
        return found


def term_changes(recipe: Recipe) -> list[tuple[str, tuple[str, ...]]]:
    """Each term of a recipe left out, and each alone beside the one that brings images and texts together."""
    active = list(recipe.terms.active())
    main = next((name for name in _ALIGNING if name in active), active[0])
    others = [name for name in active if name != main]

    def without(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"terms.{name}.weight=0" for name in names)

    rows = [(f"without {name}", without([name])) for name in others]
    # With fewer others these would be the same changes by other names.
    if len(others) > 2:
        rows += [(f"{main} and {name} alone", without([o for o in others if o != name])) for name in others]
    if len(others) > 1:
        rows.append((f"{main} alone", without(others)))
    return rows


def parse_fractions(text: str) -> tuple[Fraction, ...]:
    """``1,1/2,0.25`` as fractions, largest first. Raises InputError where one is none, or not above 0 and up to 1."""
    found = []
    for part in text.split(","):
        try:
            fraction = Fraction(part.strip())
        except (ValueError, ZeroDivisionError):
            fraction = Fraction(0)
        if not 0 < fraction <= 1:
            raise InputError(f"--fractions: {part.strip()!r} is no fraction of the pairs: write 1,1/2,1/4 or 1,0.5.")
        found.append(fraction)
    return tuple(sorted(set(found), reverse=True))


def batch_for(wanted: int, pairs: int) -> int | None:
    """Pairs a step where there are `pairs`: as wanted, or where that is more than there are the largest power of two in
    half of them; None where that is too few for a contrastive loss.
    """
    if wanted <= pairs:
        return wanted
    batch = 1 << max(0, (pairs // 2).bit_length() - 1)
    return batch if batch >= SMALLEST_BATCH else None


def rated(recipe: Recipe, rate: float) -> Recipe:
    """The recipe with all its learning rates times `rate`."""
    own = {name: value for name in RATES if (value := getattr(recipe.optimizer, name)) is not None}
    update = {name: float(f"{value * rate:.4g}") for name, value in own.items()}
    return recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update=update)})


def rate_between(small: tuple[Fraction, float], large: tuple[Fraction, float], fraction: Fraction) -> float:
    """The factor for a fraction between two whose factors were searched: on a line over both logarithms."""
    if small[0] == large[0]:
        return large[1]
    share = math.log(fraction / small[0]) / math.log(large[0] / small[0])
    return math.exp((1 - share) * math.log(small[1]) + share * math.log(large[1]))


def recipe_of(asked: Asked, method: Method, fraction: Fraction, seed: int, seen: int, batch: int | None) -> Recipe:
    """The recipe of a cell at its own learning rates. Raises InputError as `load_recipe` does."""
    overrides = [
        *asked.changes,
        *method.changes,
        *([] if asked.judged else [f"data.set_aside={asked.aside}"]),
        f"data.train={json.dumps(list(asked.data))}",
        f"data.fraction={float(fraction)}",
        f"data.fraction_seed={seed}",
        f"seed={seed}",
        f"schedule.pairs_seen={seen}",
    ]
    if batch is not None:
        overrides.append(f"schedule.batch_size={batch}")
    return load_recipe(method.recipe, overrides)


def _compared(by_name: dict[str, Method], name: str, option: str) -> Method:
    if name not in by_name:
        raise InputError(f"{option} {name} is not among the recipes compared: name one of {', '.join(by_name)}.")
    return by_name[name]


def _name(recipe: str) -> str:
    return Path(recipe).stem if recipe.endswith(".toml") else recipe
