"""What MODEL names: a whole model, two towers joined by a plus, or a recipe that says what it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from declip.errors import InputError
from declip.recipe import said_in_file, shipped
from declip.training.plan import override

BASE = "clip"
"""The recipe of models that bring none."""
INITS = ("model.init", "model.image.init", "model.text.init")


@dataclass(frozen=True)
class Start:
    """recipe: what `load_recipe` takes; inits: of INITS, what MODEL is; said: what a recipe says itself, by path."""

    recipe: str
    inits: Mapping[str, str] = field(default_factory=dict)
    said: Mapping[str, Any] = field(default_factory=dict)

    @property
    def overrides(self) -> list[str]:
        return [override(path, value) for path, value in self.inits.items()]


def read_name(model: str, said: Mapping[str, Any]) -> Start:
    """What `model` names; said: what the user says besides, by path.

    Raises InputError where a plus has nothing on one side, or the user says once more what to start from.
    """
    if Path(model).is_file() and model.endswith(".toml"):
        return Start(model, said={**said_in_file(Path(model)), "terms": None})
    if model in shipped() and not _exists(model):
        return Start(model, said={"name": model, "terms": None})
    if twice := next((path for path in INITS if path in said), None):
        raise InputError(f"MODEL {model} says what to start from, and so does {twice}: leave one of them out.")
    if _exists(model) or "+" not in model:
        return Start(BASE, {"model.init": model})
    image, text = _split(model)
    return Start(BASE, {"model.image.init": image, "model.text.init": text})


def _split(model: str) -> tuple[str, str]:
    """Around the plus that leaves most paths that exist on its sides, as paths may have one too."""
    places = [place for place, sign in enumerate(model) if sign == "+"]
    found = [(model[:place].strip(), model[place + 1 :].strip()) for place in places]
    image, text = max(found, key=lambda sides: sum(map(_exists, sides)))
    if not image or not text:
        raise InputError(f"{model} names one tower alone: write IMAGE+TEXT, for example tf_efficientnet_lite0+minilm/.")
    return image, text


def _exists(name: str) -> bool:
    return bool(name) and Path(name.removeprefix("local-dir:")).expanduser().exists()
