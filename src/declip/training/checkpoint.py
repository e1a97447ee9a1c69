"""Run folders: what is written, when, and how it is read back."""

from __future__ import annotations

import errno
import hashlib
import pickle
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from declip.errors import InputError, first_line
from declip.files import check_unused, write_atomically
from declip.recipe import Recipe, flat, load_recipe, parse_recipe, to_toml

RECIPE, METRICS = "recipe.toml", "metrics.jsonl"
FORMAT = 1  # of checkpoints; one more wherever older ones could not be read
SEAL = b"declip-checkpoint"  # ends a checkpoint file, before its checksum
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
    _check_same(load_recipe(stored), recipe, out)
    if (out / "checkpoints" / "last.pt").is_file():
        raise InputError(f"{out} was trained by an earlier version of declip: resume with that, or start anew.")
    return bool(checkpoints(out))


def make_run(out: Path, recipe: Recipe, beside: Mapping[str, str] | None = None) -> None:
    """Make the run folder with its recipe, unless it is there; raises InputError where it cannot be made.

    beside: more files by name, and what they say; they are there before the recipe is
    """
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"The folder {out} cannot be made ({error.strerror}): give another --out.") from None
    for name, text in {**(beside or {}), RECIPE: to_toml(recipe)}.items():
        write_atomically(out / name, partial(_write_text, text))


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _check_same(stored: Recipe, asked: Recipe, where: Path) -> None:
    """Raises InputError where the recipes differ in more than the schedule, which `read_newest` looks at."""
    same_schedule = asked.schedule.model_copy(update={"batch_size": stored.schedule.batch_size})
    # A checkpoint is whole, however a run's ranks share it out.
    engine = stored.engine.model_copy(update={"shard": asked.engine.shard})
    difference = first_difference(stored.model_copy(update={"schedule": same_schedule, "engine": engine}), asked)
    if difference:
        raise InputError(f"{where} was trained with another recipe ({difference}): resume with the same one.")


def first_difference(stored: Recipe, asked: Recipe) -> str | None:
    """The first field in which two recipes differ, and both values; None where they are the same."""
    old, new = flat(stored.model_dump(mode="json")), flat(asked.model_dump(mode="json"))
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            return f"{path} = {old.get(path)!r} there, {new.get(path)!r} now"
    return None


def checkpoints(out: Path) -> list[Path]:
    """A run's checkpoints, the newest first."""
    return sorted((out / "checkpoints").glob("step_*.pt"), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says; raises InputError where it is none of ours."""
    found = re.fullmatch(r"step_(\d+)\.pt", path.name)
    if not found:
        raise InputError(f"{path} is not named as a checkpoint, step_NUMBER.pt: move it elsewhere.")
    return int(found[1])


class _Hashed:
    """A file that PyTorch writes to, the checksum of what it wrote, and what went wrong first."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(out: Path, step: int, state: dict[str, Any]) -> None:
    """Everything that a resumed run needs, as one file: what torch.save writes, SEAL and the SHA-256 of it."""
    import torch

    def write(path: Path) -> None:
        with path.open("wb") as file:  # given a path, PyTorch writes by itself and a full disk is no OSError
            hashed = _Hashed(file)
            try:
                torch.save(state, hashed)  # type: ignore[arg-type]
            except RuntimeError as error:  # PyTorch ends the file even so, and fails at that
                raise hashed.error or error from None
            file.write(SEAL + hashed.hash.digest())

    write_atomically(out / "checkpoints" / f"step_{step:08d}.pt", write, durable=True)


def read_newest(out: Path, recipe: Recipe, before: int | None, fits: Callable[[Recipe, int], bool]) -> dict[str, Any]:
    """The newest intact checkpoint's state; nothing in it is executed (weights_only). Newer ones are removed,
    damaged ones get another name.

    before: take one of an earlier step than this, where there is one
    fits: whether a checkpoint of that recipe, with another schedule perhaps, and step can be gone on from
    Raises InputError where none is intact or fits, or the newest is of another recipe or format.
    """
    found = checkpoints(out)
    older = [path for path in found if before is None or step_of(path) < before] or found[-1:]
    damaged: list[Path] = []
    other = None
    for path in older:
        damage = _damage(path)
        if damage is None:
            state, stored = _load(path, recipe)
            if not fits(stored, step_of(path)):
                other = first_difference(stored, recipe)
                continue
            for bad in damaged:
                bad.rename(bad.with_suffix(".damaged"))
            for newer in found[: found.index(path)]:
                newer.unlink(missing_ok=True)
            return state
        damaged.append(path)
        print(f"{path} {damage}: the one before it is taken.", file=sys.stderr)
    if other is not None:
        raise InputError(
            f"{out} was trained with another schedule ({other}), under which the steps done had other learning rates: "
            "resume with the same one. What can be prolonged is schedule.shape = constant, with schedule.warmup_pairs."
        )
    raise InputError(f"{out / 'checkpoints'} holds no intact checkpoint: start the run anew with another --out.")


def _damage(path: Path) -> str | None:
    """What is wrong with a file, or None where its checksum fits."""
    length = len(SEAL) + hashlib.sha256().digest_size
    left = path.stat().st_size - length
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while left > 0 and (part := file.read(min(left, 2**20))):
            digest.update(part)
            left -= len(part)
        end = file.read()
    if len(end) != length or not end.startswith(SEAL):
        return "is cut short or damaged"
    return None if end == SEAL + digest.digest() else "is damaged (its checksum does not fit)"


def _load(path: Path, recipe: Recipe) -> tuple[dict[str, Any], Recipe]:
    """What a checkpoint holds, and the recipe in it."""
    import torch

    try:
        # Of a zip file the end matters, and the seal is short enough for PyTorch to find it.
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}): start the run anew.") from None
    if state.get("format") != FORMAT:
        raise InputError(
            f"{path} is of format {state.get('format')}, this version of declip reads format {FORMAT}: resume with the "
            "version that wrote it."
        )
    stored = parse_recipe(state["recipe"], str(path))
    _check_same(stored, recipe, path)
    return state, stored
