"""Run folders: what is written, when, and how it is read back."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path
from typing import Any

from declip.errors import InputError, first_line
from declip.files import check_unused, write_atomically
from declip.recipe import Recipe, load_recipe, to_toml

RECIPE, METRICS, LAST = "recipe.toml", "metrics.jsonl", "checkpoints/last.pt"
WEIGHTS_BEST, HEADS_BEST = "checkpoints/best.safetensors", "checkpoints/best_heads.safetensors"


def check_run(out: Path, recipe: Recipe, resume: bool) -> bool:
    """Whether there is a checkpoint to go on from; looks only, so that a slip is answered before any work is done.

    Raises InputError where the folder holds another run, or --resume finds a different recipe or nothing.
    """
    if not resume:
        check_unused(out, "give another --out, or --resume to go on with the run there")
        return False
    stored = out / RECIPE
    if not stored.is_file():
        raise InputError(f"{out} holds no run to resume: leave out --resume to start one there.")
    difference = first_difference(load_recipe(stored), recipe)
    if difference:
        raise InputError(f"{out} was trained with another recipe ({difference}): resume with the same one.")
    return (out / LAST).is_file()


def make_run(out: Path, recipe: Recipe) -> None:
    """Make the run folder with its recipe, unless it is there; raises InputError where it cannot be made."""
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"The folder {out} cannot be made ({error.strerror}): give another --out.") from None
    text = to_toml(recipe)
    write_atomically(out / RECIPE, lambda path: path.write_text(text, encoding="utf-8"))


def first_difference(stored: Recipe, asked: Recipe) -> str | None:
    """The first field in which two recipes differ, and both values; None where they are the same."""
    old, new = _flat(stored.model_dump(mode="json")), _flat(asked.model_dump(mode="json"))
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            return f"{path} = {old.get(path)!r} there, {new.get(path)!r} now"
    return None


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    return {path: v for name, value in values.items() for path, v in _flat(value, f"{prefix}{name}.").items()}


def save_checkpoint(out: Path, state: dict[str, Any]) -> None:
    """Everything that a resumed run needs, as one file."""
    import torch

    def write(path: Path) -> None:
        with path.open("wb") as file:  # given a path, PyTorch writes by itself and a full disk is no OSError
            torch.save(state, file)

    write_atomically(out / LAST, write)


def read_checkpoint(out: Path) -> dict[str, Any]:
    """The last checkpoint's state; nothing in it is executed (weights_only)."""
    import torch

    try:
        state: dict[str, Any] = torch.load(out / LAST, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"{out / LAST} cannot be read ({first_line(error)}): start the run anew.") from None
    return state
