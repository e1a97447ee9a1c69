"""Cells side by side, each in a process of its own; what is finished is kept, what is interrupted goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from declip.compare.cell import RESULT, RUN, SPEC
from declip.compare.grid import CELLS, FORMAT, Cell
from declip.errors import InputError, Preempted, RunStopped
from declip.files import write_atomically
from declip.recipe import to_toml

_TICK = 0.5  # seconds between two looks at what runs
_TAIL = 2**16  # bytes of metrics.jsonl that are read to see how far a run is

Told = Callable[[float, float, int, int], None]
"""Told now and then: work done, of how much, cells done, of how many."""


@dataclass
class _Running:
    cell: Cell
    folder: Path
    process: subprocess.Popen[bytes]
    slot: int


def finished(out: Path, cell: Cell) -> dict[str, Any] | None:
    """What a cell has found, where it has run."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        found: dict[str, Any] = json.loads((out / cell.file).read_text())
        return found
    return None


def run_cells(
    out: Path,
    cells: Sequence[Cell],
    flops: dict[str, float],
    jobs: int,
    environments: Sequence[dict[str, str]],
    told: Told | None = None,
) -> dict[str, dict[str, Any]]:
    """Run what is not finished, `jobs` at a time; what each has found, by its key.

    flops: of a pair, by method: of a seed's cells the longest are begun first, so that none is left alone at the end
    environments: of the processes in each slot, taken in turn
    Raises InputError where a cell's input is wrong, RunStopped where a cell has ended otherwise, KeyboardInterrupt and
    Preempted when asked to stop; the others save their state first.
    """
    wanted = {cell.key: cell for cell in cells}
    found = {key: result for key, cell in wanted.items() if (result := finished(out, cell)) is not None}
    work = {key: flops[cell.method] * cell.seen for key, cell in wanted.items()}
    waiting = sorted((key for key in wanted if key not in found), key=lambda key: (-wanted[key].seed, work[key]))
    running: list[_Running] = []
    before = sum(work[key] for key in found)
    with _stopped_by_signals():
        try:
            while waiting or running:
                free = sorted(set(range(jobs)) - {one.slot for one in running})
                while waiting and free:
                    slot = free.pop(0)
                    running.append(
                        _start(out, wanted[waiting.pop()], flops, slot, environments[slot % len(environments)])
                    )
                time.sleep(_TICK)
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    found[one.cell.key] = _collect(out, one)
                if told:
                    done = sum(work[key] for key in found)
                    partly = sum(_pairs_seen(one.folder / RUN) * flops[one.cell.method] for one in running)
                    told(done + partly - before, sum(work.values()) - before, len(found), len(wanted))
        finally:
            _stop(running)
    return found


def _start(out: Path, cell: Cell, flops: dict[str, float], slot: int, environment: dict[str, str]) -> _Running:
    folder = out / CELLS / cell.key
    folder.mkdir(parents=True, exist_ok=True)
    spec = {
        **cell.described(),
        "seen": cell.seen,
        "flops_per_pair": flops[cell.method],
        "judged": list(cell.judged),
        "format": FORMAT,
    }
    # Written out in full, a default would count as said, and contradict what the weights of a start say.
    recipe = to_toml(cell.recipe, said=True)
    write_atomically(folder / "recipe.toml", lambda path: path.write_text(recipe, "utf-8"))
    write_atomically(folder / SPEC, lambda path: path.write_text(json.dumps(spec)))
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "declip.compare.cell", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C is this process's to handle: a cell is told once, and saves its state
        )
    return _Running(cell, folder, process, slot)


def _collect(out: Path, one: _Running) -> dict[str, Any]:
    cell, code = one.cell, one.process.returncode
    where = f"{cell.method} with {cell.fraction} of the pairs, seed {cell.seed}"
    log = (one.folder / "log.txt").read_text("utf-8", "replace").strip().splitlines()
    if code == 2 and log:
        shutil.rmtree(one.folder, ignore_errors=True)  # a run that has not begun is no run to go on with
        raise InputError(f"{where}: {log[-1]}")
    if code:
        why = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise RunStopped(
            f"{where}: the run {why}, see {one.folder / 'log.txt'}. What is finished is kept: run the command again, "
            "with fewer --jobs where memory was short."
        )
    os.replace(one.folder / RESULT, out / cell.file)
    shutil.rmtree(one.folder, ignore_errors=True)
    found = finished(out, cell)
    assert found is not None
    return found


def _pairs_seen(run: Path) -> int:
    """How far a run is, by the last whole row of its metrics.jsonl."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            return int(json.loads(file.read().splitlines()[-1])["pairs"])
    except (OSError, json.JSONDecodeError, IndexError, KeyError):
        return 0


def _stop(running: Sequence[_Running]) -> None:
    """Have every run save its state and end; wait for it. One that has not begun, or is judged already, just ends."""
    for one in running:
        with contextlib.suppress(ProcessLookupError):
            one.process.terminate()
    for one in running:
        one.process.wait()


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Within, SIGTERM raises Preempted, and Ctrl-C KeyboardInterrupt also where a shell in the background ignores it.

    Outside the main thread, where Python allows no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        raise Preempted("stopped by SIGTERM; what is finished is kept: the same command goes on.")

    handlers: dict[signal.Signals, Any] = {signal.SIGTERM: terminate, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
