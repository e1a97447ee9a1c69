"""Train CLIP-style models with few pairs: ``declip.train``, ``declip.load``, ``declip.evaluate``.

Importing the package costs nothing: PyTorch is imported by the first function that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from declip.evaluation import evaluate
    from declip.model.pretrained import load
    from declip.recipe import load_recipe
    from declip.training.loop import train

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "load", "load_recipe", "train"]

_HOMES = {
    "evaluate": "declip.evaluation",
    "load": "declip.model.pretrained",
    "load_recipe": "declip.recipe",
    "train": "declip.training.loop",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'declip' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
