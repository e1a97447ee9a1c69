"""A recipe says everything about a run: data, towers, terms, optimizer, schedule, engine, evaluation.

Recipes are TOML files. Every field has a type, a default and a one-line explanation, any field can be
overridden by its path (``schedule.epochs=20``), and an unknown name is answered with the nearest right one.
"""

from __future__ import annotations

import copy
import difflib
import tomllib
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from declip.architecture import OURS, Model
from declip.engine import Engine
from declip.errors import InputError
from declip.optimization import Optimizer, Schedule
from declip.pairs import Data
from declip.terms import TEXT_VIEWS, Contrastive, Section, Terms

SELF_SUPERVISED = {"simsiam", "simclr"}
MIXED = {"contrastive", "simsiam", "masked_language"}  # terms that know what a mixed picture is, or need not


class Evaluation(Section):
    every: float = Field(0.05, gt=0, le=1, description="share of the run between two held-out evaluations")
    patience: int = Field(0, ge=0, description="stop after this many evaluations without a better score; 0 = never")
    tolerance: float = Field(
        1.0,
        ge=0,
        description="of the weights whose held-out score is within so many standard errors of the best, the last are "
        "kept: with few held-out pairs the best is chance in part, and later weights have learnt more; 0 = the best",
    )
    max_items: int = Field(2000, gt=1, description="at most this many held-out pairs are judged during training")
    unaveraged: bool = Field(
        False, description="with optimizer.ema or ema_half_life, score the weights themselves beside their average"
    )
    interpolate: bool = Field(
        False,
        description="at the end, mix the towers with what they started from (model.init), as does best on the held-out "
        "pairs (WiSE-FT)",
    )


class Recipe(Section):
    """A whole run."""

    name: str = Field("custom", description="name of the recipe")
    about: str = Field("", description="what it is, in a line")
    method: Literal["best", "paper", "reference"] = Field(
        "best",
        description="best: what measures best; paper: as the paper describes it; reference: the public code to the "
        "letter. For a shipped recipe, method=... on the command line sets all their differences",
    )
    seed: int = Field(0, ge=0, description="everything random derives from it")
    data: Data = Field(Data(), description="pairs and views")
    model: Model = Field(Model(), description="towers")
    terms: Terms = Field(Terms(contrastive=Contrastive()), description="the loss: a weighted sum of terms")
    optimizer: Optimizer = Field(Optimizer(), description="AdamW, Muon or SGD: what learns, how fast")
    schedule: Schedule = Field(Schedule(), description="how long, how fast")
    engine: Engine = Field(Engine(), description="device, precision, checkpoints")
    evaluation: Evaluation = Field(Evaluation(), description="held-out score during training")

    @model_validator(mode="after")
    def _terms_fit(self) -> Recipe:
        active = self.terms.active()
        if not active:
            raise ValueError("the recipe has no term with a weight above zero: give it terms.contrastive")
        for name in ("sigmoid", "text_conditioned"):
            if name in active and self.model.logit_bias_init is None:
                raise ValueError(f"terms.{name} needs a bias: set model.logit_bias_init (SigLIP starts at -10)")
        if "text_conditioned" in active and not active.keys() & {"contrastive", "sigmoid", "token_wise"}:
            raise ValueError(
                "terms.text_conditioned orders what a search has found, and no term teaches the embeddings that it "
                "searches by: give it terms.contrastive or terms.sigmoid as well"
            )
        if self.engine.compile and (self.engine.micro_batch or self.engine.grad_checkpointing):
            raise ValueError(
                "engine.compile does not go with engine.micro_batch or engine.grad_checkpointing: leave it"
            )
        if self.engine.shard and (self.optimizer.averages or self.optimizer.kind == "muon"):
            raise ValueError("engine.shard goes with neither optimizer.ema nor optimizer.kind = muon: leave one out")
        if self.evaluation.unaveraged and not self.optimizer.averages:
            raise ValueError("evaluation.unaveraged is beside optimizer.ema_half_life, which is 0: set that too")
        started = self.model.init or self.model.image.init or self.model.text.init
        to_start = {
            "evaluation.interpolate": self.evaluation.interpolate,
            "optimizer.start_decay": self.optimizer.start_decay,
        }
        for field in (name for name, asked in to_start.items() if asked):
            if not started:
                raise ValueError(f"{field} goes back to model.init, which is not set: set it, or leave that out")
            if self.engine.shard:
                raise ValueError(f"engine.shard does not go with {field}: leave one out")
        if "lora" in (self.model.image.tune, self.model.text.tune) and (
            self.engine.shard or self.evaluation.interpolate
        ):
            raise ValueError("tune = lora goes with neither engine.shard nor evaluation.interpolate: leave one out")
        teacher = self.terms.teacher_contrast
        if teacher is not None and "teacher_contrast" in active:
            if not self.optimizer.averages:
                raise ValueError(
                    "terms.teacher_contrast learns from a moving average of the weights: set optimizer.ema_half_life"
                )
            if teacher.local_images and self.data.augment_on == "device":
                raise ValueError("terms.teacher_contrast.local_images are made by data.augment_on = worker: set that")
        if self.wants_normed_tokens and "token_wise" in active:
            other = "text_conditioned" if "text_conditioned" in active else "teacher_contrast.cross_attention"
            raise ValueError(f"terms.{other} and terms.token_wise want other tokens: leave one out")
        if self.data.mix and (odd := sorted(active.keys() - MIXED)):
            raise ValueError(f"data.mix does not go with terms.{odd[0]}: leave one of them out")
        if self.data.mix and self.schedule.batch_size % 2:
            raise ValueError("data.mix mixes pictures two by two: schedule.batch_size has to be even")
        if self.model.unmasked_end and not self.model.patch_dropout:
            raise ValueError("model.unmasked_end ends model.patch_dropout, which is 0: set that too")
        return self

    @property
    def pair_views(self) -> int:
        """How many image views meet texts; the first ones."""
        active = self.terms.active()
        shared = bool(SELF_SUPERVISED & active.keys()) and self.data.strong_images is None
        return max([2 if shared else 1, *(getattr(term, "images", 1) for term in active.values())])

    @property
    def self_views(self) -> tuple[int, int]:
        """Which two image views image self-supervision takes."""
        first = 0 if self.data.strong_images is None else self.pair_views
        return first, first + 1

    @property
    def image_views(self) -> int:
        """How many image views the terms need."""
        own = bool(SELF_SUPERVISED & self.terms.active().keys()) and self.data.strong_images is not None
        return self.pair_views + (2 if own else 0)

    @property
    def text_views(self) -> list[str]:
        """Which text views the terms need, in a fixed order."""
        active = self.terms.active()
        wanted = {view for term in active.values() for view in getattr(term, "texts", [])}
        for also in ("enqueue", "teacher_texts"):
            wanted |= {view for term in active.values() for view in getattr(term, also, None) or []}
        if "masked_language" in active:
            wanted.add("masked")
        return [view for view in TEXT_VIEWS if view in wanted]

    @property
    def pads_captions(self) -> bool:
        """Whether captions are padded to the full context: a term counts the padding, as the reference does."""
        active, crossed = self.terms.active(), self.crosses
        padded = [active.get("token_wise"), active.get("teacher_contrast") if crossed else None]
        return not all(getattr(term, "mask_padding", True) for term in padded)

    @property
    def crosses(self) -> bool:
        """Whether embeddings look into tokens of the other side."""
        return bool(getattr(self.terms.active().get("teacher_contrast"), "cross_attention", False))

    @property
    def wants_normed_tokens(self) -> bool:
        """Whether a term looks at the image tower's tokens after its last norm."""
        return self.crosses or "text_conditioned" in self.terms.active()

    @property
    def local_views(self) -> int:
        """How many small crops of each image the terms need."""
        return int(getattr(self.terms.active().get("teacher_contrast"), "local_images", 0))

    @property
    def views_alike(self) -> bool:
        """Whether all image views are of one kind and not changed anew at each step: others cannot be kept."""
        data = self.data
        one_kind = data.second_images is None and not self.local_views and not self.wants_normed_tokens
        weak = data.strong_images is None or self.image_views == self.pair_views
        return one_kind and weak and not data.images.convolve

    @property
    def similarity(self) -> Literal["embedding", "token_wise"]:
        """How a trained model compares image and text: by embedding unless only the token-wise term trains it."""
        active = self.terms.active()
        by_embedding = {"contrastive", "sigmoid", "nearest_neighbour"} & active.keys()
        return "token_wise" if "token_wise" in active and not by_embedding else "embedding"


def shipped() -> list[str]:
    """Names of the recipes that come with the package: METHOD, METHOD-TOWERS, and single files."""
    towers = [f"-{tower}" for size in ("small", "published") for tower in _names(size, "towers")]
    return sorted([method + tower for method in _names("small", "") for tower in ("", *towers)] + _names("", ""))


def load_recipe(name: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a shipped recipe by name or a TOML file by path, and apply ``path=value`` overrides.

    Of the overrides, ``method=paper`` and ``method=reference`` come first: they set many fields.
    Raises InputError where there is no such recipe, the file is no TOML, a field is unknown or has a wrong type.
    """
    if str(name) in shipped():
        values, where = _shipped_values(str(name)), f"recipe {name}"
    elif Path(name).is_file():
        values, where = _toml(_read(Path(name)), str(name)), str(name)
    else:
        near = difflib.get_close_matches(str(name), shipped(), n=3, cutoff=0.0)
        raise InputError(
            f"There is no recipe {str(name)!r}: give a TOML file or one of {', '.join(near)}, … "
            "(declip recipes lists all)."
        )
    presets = values.pop("presets", {})
    changes: dict[str, Any] = {}
    for override in overrides or []:
        _override(changes, override)
    method = changes.get("method")
    if method in get_args(Recipe.model_fields["method"].annotation) and method != values.get("method", "best"):
        if not isinstance(presets, dict) or not isinstance(presets.get(method), dict):
            has = ", ".join(f"method={name}" for name in presets) if isinstance(presets, dict) else ""
            raise InputError(f"{where} has no preset method={method}: it has {has or 'none'}.")
        _merge(values, presets[method])
    _leave_to_weights(values, changes)
    _merge(values, changes)
    return parse_recipe(values, where)


def _leave_to_weights(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Drop what a recipe says of towers that are to start from weights: their architecture and pixels are the weights'.

    What the changes say stays, and is then asked of the weights.
    """
    model, own = changes.get("model"), values.get("model")
    if not isinstance(model, dict) or not isinstance(own, dict):
        return
    whole = model.get("init") is not None
    parts = [part for part in ("image", "text") if whole or _starts(model.get(part))]
    of_both = ["name", "quick_gelu", "custom_text", "embed_dim"] if parts else []
    for part in parts:
        tower = own.get(part)
        own[part] = {name: tower[name] for name in OURS & tower.keys()} if isinstance(tower, dict) else {}
    for name in [*of_both, *(["normalization"] if "image" in parts else [])]:
        own.pop(name, None)


def _starts(tower: Any) -> bool:
    return isinstance(tower, dict) and tower.get("init") is not None


def _shipped_values(name: str) -> dict[str, Any]:
    """The values of a shipped recipe, composed from the method's file and the towers' file."""
    if name in _names("", ""):
        return _toml(_file(f"{name}.toml").read_text("utf-8"), name)
    method, _, tower = name.partition("-")
    size = "published" if tower in _names("published", "towers") else "small"
    values = _toml(_file(f"{size}/{method}.toml").read_text("utf-8"), name)
    values["presets"] = _toml(_file(f"published/{method}.toml").read_text("utf-8"), name).get("presets", {})
    if tower:
        towers = _toml(_file(f"{size}/towers/{tower}.toml").read_text("utf-8"), name)
        values["about"] = f"{values['about']}; {towers.pop('about')}"
        _merge(values, towers)
    return {**values, "name": name}


def _names(size: str, folder: str) -> list[str]:
    entries = _file("/".join(part for part in (size, folder) if part)).iterdir()
    return sorted(entry.name.removesuffix(".toml") for entry in entries if entry.name.endswith(".toml"))


def _file(path: str) -> Traversable:
    return (resources.files("declip") / "recipes").joinpath(*path.split("/") if path else [])


def _toml(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where} is not valid TOML: {error}.") from None


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put `changes` into nested `values`; None and values replace, sections are merged."""
    for name, change in changes.items():
        if isinstance(change, dict) and isinstance(values.get(name), dict):
            _merge(values[name], change)
        else:
            values[name] = copy.deepcopy(change)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file in UTF-8: give a recipe in TOML.") from None


def parse_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate nested values; raises InputError with one sentence."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise InputError(_sentence(error, where)) from None


class _Options(Section):
    data: Data = Data()


def parse_data(options: list[str]) -> Data:
    """The data section that ``data.NAME=value`` options say; raises InputError as `load_recipe` does."""
    values: dict[str, Any] = {}
    for option in options:
        _override(values, option)
    try:
        return _Options.model_validate(values).data
    except ValidationError as error:
        raise InputError(_sentence(error, "options")) from None


def said_in(overrides: Sequence[str]) -> dict[str, Any]:
    """What ``path=value`` overrides say, by path; raises InputError as `load_recipe` does."""
    values: dict[str, Any] = {}
    for override in overrides:
        _override(values, override)
    return flat(values)


def said_in_file(path: Path) -> dict[str, Any]:
    """What a recipe's TOML file says, by path; raises InputError where it is no TOML."""
    return flat(_toml(_read(path), str(path)))


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values by path; a section that says nothing stays as it is."""
    if not isinstance(values, dict) or (prefix and not values):
        return {prefix.rstrip("."): values}
    return {path: v for name, value in values.items() for path, v in flat(value, f"{prefix}{name}.").items()}


def to_toml(recipe: Recipe, said: bool = False) -> str:
    """The resolved recipe as TOML text, every field written out, or those alone that are `said` and no defaults."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True, exclude_unset=said))


def _override(values: dict[str, Any], override: str) -> None:
    path, equals, raw = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise InputError(f"{override!r} is not an override: write path=value, for example schedule.epochs=20.")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw  # a bare word is a string
    section = values
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise InputError(f"{override!r}: {part} is a value, not a section.")
    section[parts[-1]] = None if value == "none" else value


def field_paths(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every field's path, sections included."""
    paths = []
    for name, field in section.model_fields.items():
        paths.append(prefix + name)
        inner = _inner_section(field.annotation)
        if inner:
            paths += field_paths(inner, f"{prefix}{name}.")
    return paths


def _inner_section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _sentence(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path, field_paths(), n=1, cutoff=0.0)
        return f"{where}: there is no field {path}; the nearest is {near[0]}."
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], dict | BaseModel):
        return f"{where}: {path}: {message}." if path else f"{where}: {message}."
    return f"{where}: {path} = {first['input']!r} is wrong: {message[0].lower()}{message[1:]}."
