"""What a run tells: metrics.jsonl, progress on the terminal, TensorBoard where it is there, trackers if asked for."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from declip.errors import first_line
from declip.files import write_atomically
from declip.recipe import Recipe
from declip.training.trackers import Tracker, start_trackers


class _Bar(Progress):
    """The bar, and below it the terms, which would not fit beside it on 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(task.fields["terms"], style="dim") for task in self.tasks)


class RunLog:
    """Rows for metrics.jsonl, a live line for people, scalars for TensorBoard and trackers. Use as a context manager.

    Raises InputError where a tracker cannot start.
    """

    every_step = False  # whether it wants a row of every step, not one now and then

    def __init__(self, out: Path, recipe: Recipe, steps: int, first: int, quiet: bool) -> None:
        self._out = out
        self._trackers: dict[str, Tracker] = start_trackers(recipe, out)
        self._file = self._open()
        self.console = Console(stderr=True, quiet=quiet)
        self._board = _tensorboard(out, first)
        self._progress = _Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
        )
        self._task = self._progress.add_task(recipe.name, total=steps, completed=first, text="", terms="")
        self._held_out = ""

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()
        self._tell_trackers(lambda tracker: tracker.finish())

    def _open(self) -> TextIO:
        return open(self._out / "metrics.jsonl", "a", buffering=1)

    def cut(self, step: int) -> None:
        """Drop the rows after `step`: the run has gone back to it and makes them again."""
        self._file.close()
        cut_metrics(self._out, step)
        self._file = self._open()
        if self._board is not None:
            self._board.close()
            self._board = _tensorboard(self._out, step)
        self._progress.update(self._task, completed=step)

    def train(self, row: dict[str, Any]) -> None:
        self._write(row)
        text = f"{row['samples_per_second']:.0f} pairs/s  loss {row['loss']:.3f}{self._held_out}"
        terms = "  ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in row["terms"].items())
        self._progress.update(self._task, completed=row["step"], text=text, terms=terms)

    def held_out(self, row: dict[str, Any]) -> None:
        self._write(row)
        self._held_out = f"  held-out {row['held_out']['score']:.1f}"

    def say(self, text: str, style: str | None = None) -> None:
        # File names may hold what rich would take for markup.
        self.console.print(text, style=style, markup=False, highlight=False)

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
        scalars = dict(_scalars(row))
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, row["step"])
        self._tell_trackers(lambda tracker: tracker.log(row["step"], scalars))

    def _tell_trackers(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                tell(tracker)
            except Exception as error:  # whatever is wrong there, the run goes on
                del self._trackers[name]
                self.say(f"{name} gets no more rows: {first_line(error)}.", style="yellow")


class NoLog(RunLog):
    """Of the ranks beside the first: says and writes nothing."""

    def __init__(self) -> None:
        pass

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def cut(self, step: int) -> None:
        pass

    def train(self, row: dict[str, Any]) -> None:
        pass

    def held_out(self, row: dict[str, Any]) -> None:
        pass

    def say(self, text: str, style: str | None = None) -> None:
        pass


def cut_metrics(out: Path, step: int) -> None:
    """Drop the rows after `step` from metrics.jsonl: a resumed run makes them again."""
    path = out / "metrics.jsonl"
    if path.is_file():
        kept = "".join(f"{json.dumps(row)}\n" for row in read_metrics(out) if row["step"] <= step)
        write_atomically(path, lambda temporary: temporary.write_text(kept))


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; a last row that was cut off, by a full disk say, is left out."""
    rows = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not know: the loss of a skipped step."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(row: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in row.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            found.append((prefix + name, float(value)))
    return found


def _tensorboard(out: Path, step: int) -> Any:
    """A writer of what comes after `step`; what an earlier one wrote of those steps is not shown any more."""
    with contextlib.suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
    return None


def resident_bytes() -> int:
    """Memory of this process and its workers now, shared pages counted once (Linux); elsewhere the peak so far."""
    if sys.platform != "linux":
        return most_resident_bytes()
    total = 0
    for process in [os.getpid(), *_children()]:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def most_resident_bytes() -> int:
    """The most memory that this process has held so far (not on Windows)."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _children() -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    return []
