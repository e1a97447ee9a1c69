"""Runs that are broken off, for tests of going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from declip.recipe import Recipe
from declip.training import loop


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have runs stop as Ctrl-C does when so many steps are taken."""
    real = loop.learning_rate

    def rate(number: int, *rest: Any) -> float:
        if number == step:
            raise KeyboardInterrupt
        return real(number, *rest)

    monkeypatch.setattr(loop, "learning_rate", rate)


def stop_after(recipe: Recipe, out: Path, steps: int) -> None:
    """Start a run and break it off."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(steps, patch)
        with pytest.raises(KeyboardInterrupt):
            loop.train(recipe, out, quiet=True)
