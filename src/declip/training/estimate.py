"""`declip train --dry-run`: a few real steps, and from them what the whole run will need: memory, hours, money."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from declip.errors import Diverged, InputError
from declip.memory import GB, free_bytes, give_back_freed_memory
from declip.progress import Progress
from declip.recipe import Recipe
from declip.training.distributed import joined_ranks, one_voice
from declip.training.interrupts import Interrupts
from declip.training.logging import NoLog, most_resident_bytes
from declip.training.loop import batch_maker, go, make_step, set_up
from declip.training.run import Run

WARM_UP, TIMED = 2, 5  # steps
SCORED = 128  # images of the held-out pairs: how long these take says how long all do


class _Notes(NoLog):
    """Keeps the rows of the steps instead of writing them, and when they were."""

    every_step = True

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rows: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self.came, self.judging = time.perf_counter(), 0.0

    def train(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.seconds.append(self.run.seconds)
        self.came = time.perf_counter()

    def held_out(self, row: dict[str, Any]) -> None:
        self.judging = time.perf_counter() - self.came


def estimate(
    recipe: Recipe, price: float | None = None, keep: bool = False, progress: Progress | None = None, timed: int = TIMED
) -> dict[str, Any]:
    """What a run of the recipe will need, from `timed` of its steps after 2 to warm up; writes no run folder.

    As one of several processes where torchrun has started them; what rank 0 gives back is the answer.

    parameters: of each tower, and of all else (`heads`: logit scales too)
    memory_gb: of each rank. `peak`: of the process, without the loader's, or of the GPU's memory; `activations`: what
        the steps needed at their peak beyond what was there before and gradients and optimizer state
    seconds_per_step, samples_per_second, data_wait: of the timed steps; where the loader, by the time that one of
        its processes takes for a batch, is slower than that, as slow as the loader
    hours: of all steps and of scoring the held-out pairs; device_hours: times ranks; cost: times the price
    price: of a device for an hour, in any currency
    keep: compute what the run will keep of the pairs, and time its steps on that; otherwise on zeros in its place
    Raises InputError for whatever `train` would raise it, but for the run folder.
    """
    # Scored once, after the last step. The order of the pairs has no end, however short the run.
    once = recipe.evaluation.model_copy(update={"every": 1.0, "patience": 0})
    with joined_ranks(recipe) as ranks:
        with one_voice(ranks):
            run = set_up(
                recipe.model_copy(update={"evaluation": once}), None, False, ranks, keep=keep, progress=progress
            )
        share = _score_fewer(run)
        run.score()  # the first takes longer than all others: what rests is asked then, and kernels are chosen
        steps, run.steps = run.steps, WARM_UP + timed
        loader = _loader_seconds(run)
        before = _start_of_memory(run.device)
        notes = _Notes(run)
        try:
            go(run, make_step(run), NoLog() if ranks.rank else notes, Interrupts())
        except Diverged as divergence:
            raise InputError(f"{divergence}: lower optimizer.lr (now {recipe.optimizer.lr:g}).") from None
        memory = _memory(run, before)
    if ranks.rank:
        return {}
    judgings = math.ceil(steps / max(1, round(recipe.evaluation.every * steps))) if run.held_out else 0
    found = {**_facts(run, steps), "memory_gb": memory, **_speed(notes, loader, recipe.schedule.batch_size, timed)}
    seconds_per_score = notes.judging / share
    hours = (steps * found["seconds_per_step"] + judgings * seconds_per_score) / 3600
    device_hours = hours * ranks.count
    return {
        **found,
        "held_out_scores": judgings,
        "seconds_per_score": seconds_per_score,
        "hours": hours,
        "device_hours": device_hours,
        "cost": None if price is None else device_hours * price,
    }


def _facts(run: Run, steps: int) -> dict[str, Any]:
    counts = {name: sum(p.numel() for p in parameters) for name, parameters in run.watch.towers.items()}
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type
    return {
        "recipe": run.recipe.name,
        "device": device,
        "ranks": run.ranks.count,
        "training_pairs": len(run.images.source),
        "batch_size": run.recipe.schedule.batch_size,
        "steps": steps,
        "parameters": {**counts, "total": sum(counts.values())},
    }


def _score_fewer(run: Run) -> float:
    """Have it score SCORED images of the held-out pairs; returns which share they are, 1 where all are scored."""
    if run.held_out is None or run.whole_copy is not None:  # gathering a model takes as long for fewer images
        return 1.0
    count = len(run.held_out.images)
    run.held_out = run.held_out.first(SCORED)
    return len(run.held_out.images) / count


def _speed(notes: _Notes, loader: float, batch_size: int, timed: int) -> dict[str, Any]:
    ends, rows = notes.seconds[-timed - 1 :], notes.rows[-timed:]
    times = [end - start for start, end in itertools.pairwise(ends)]
    measured = sum(times) / timed
    waited = sum(row["data_wait"] * seconds for row, seconds in zip(rows, times, strict=True)) / timed
    # The first batches were made ahead, while the first steps ran: the steps alone do not tell whether the loader
    # keeps up.
    step = max(measured, loader)
    found = {
        "seconds_per_step": step,
        "samples_per_second": batch_size / step,
        "data_wait": 1 - (measured - waited) / step,
        "loader_seconds_per_batch": loader,
    }
    if rows[-1].get("mfu"):
        found["mfu"] = sum(row["mfu"] for row in rows) / timed * measured / step
    return found


def _loader_seconds(run: Run) -> float:
    """How far apart the loader's processes finish their batches, if each takes as long as this one for its first.

    0 without such processes: then the steps include it.
    """
    workers = run.recipe.data.workers
    if not workers:
        return 0.0
    maker, threads = batch_maker(run), torch.get_num_threads()
    torch.set_num_threads(1)  # as they have
    start = time.perf_counter()
    maker.make(0)
    seconds = time.perf_counter() - start
    torch.set_num_threads(threads)
    return seconds / workers


# Memory


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free for the towers, with nothing kept that has been freed; None where that is not known."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    give_back_freed_memory()
    return free_bytes()


def _start_of_memory(device: torch.device) -> int:
    """Forget the peak of what came before; the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    give_back_freed_memory()  # what scoring took
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # not allowed everywhere; the peak is then that of the whole process
            Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _peak_of_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    """Bytes of this process in memory; elsewhere than on Linux always the most there were."""
    if sys.platform != "linux":
        return most_resident_bytes()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _memory(run: Run, before: int) -> dict[str, float]:
    parts = {
        "weights": [*run.parameters, *(tensor for part in (run.model, run.objective) for tensor in part.buffers())],
        "gradients": [p.grad for p in run.parameters if p.grad is not None],
        "optimizer": [x for state in run.optimizer.state.values() for x in state.values() if torch.is_tensor(x)],
    }
    sizes = {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in parts.items()}
    peak = _peak_of_memory(run.device)
    sizes["activations"] = max(0, peak - before - sizes["gradients"] - sizes["optimizer"])
    return {name: size / GB for name, size in {**sizes, "peak": peak}.items()}
