"""How fast training is, beside a plain open_clip loop on the same towers, pairs, batch size and CPU threads.

    python benchmarks/throughput.py                 the three loops by turns, and the start-up time
    python benchmarks/throughput.py --check --json  the same as JSON; exit code 1 where a target is missed
    python benchmarks/throughput.py --profile       where a step's time goes, as rows of a Markdown table

Needs an otherwise idle computer, and torchvision for the peer. Every loop has one loader process, computes in float32
and is timed in the same way: from batch to batch as the training step receives them, the first ones left out.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peer_open_clip import Pairs, build_peer
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from declip.data.loader import BatchMaker
from declip.data.sources import open_sources
from declip.demo import TRAIN
from declip.model import dual_encoder
from declip.model.towers import model_config
from declip.objectives import objective
from declip.pairs import Data
from declip.recipe import Recipe, load_recipe
from declip.training import loop

FASTER_THAN_OPEN_CLIP = 1.3  # at least: pairs a second of our CLIP over the peer's
DECLIP_STEP = 1.8  # at most: seconds a step of DeCLIP over our CLIP's
START_UP = 0.3  # at most: seconds of `declip --help` and of `import declip`
START_UPS = {"python -m declip --help": ["-m", "declip", "--help"], "import declip": ["-c", "import declip"]}
NAMES = {"open_clip": "open_clip loop", "clip": "declip, recipe clip", "declip": "declip, recipe declip"}

console = Console(stderr=True)


class Clock:
    """Notes when each batch reaches the training step, and how long the step waited for it."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.arrivals: list[float] = []
        self.waits: list[float] = []
        self.parts: list[dict[str, float]] = []  # for each batch, seconds by part until the next one is there

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches, noted as they pass."""
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.arrivals.append(time.perf_counter())
            self.waits.append(self.arrivals[-1] - asked)
            self.parts.append(defaultdict(float))
            yield batch

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to the part."""

        def run(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            result = function(*args, **kwargs)
            if self.parts:
                self.parts[-1][part] += time.perf_counter() - begun
            return result

        return run

    @property
    def first(self) -> int:
        """The first step that counts: by then caches, allocator and loader have settled."""
        return min(5, len(self.arrivals) // 3)

    def figures(self, batch_size: int) -> dict[str, float]:
        """Speed over the steps that count; everything between two batches is part of the step, logging too."""
        arrivals = self.arrivals[self.first :]
        seconds, steps = arrivals[-1] - arrivals[0], len(arrivals) - 1
        return {
            "pairs_per_second": steps * batch_size / seconds,
            "step_seconds": seconds / steps,
            "waiting_share": sum(self.waits[self.first + 1 :]) / seconds,
            "seconds_to_first_batch": self.arrivals[0] - self.start,
        }


def run_open_clip(recipe: Recipe, steps: int) -> Clock:
    """Train the recipe's towers as a user of open_clip writes it, in float32 and with a loader process."""
    clock = Clock()
    torch.manual_seed(recipe.seed)
    model, criterion, optimizer = build_peer(recipe)
    pairs = Pairs(open_sources(TRAIN, Data()), recipe)
    loader = DataLoader(
        pairs, recipe.schedule.batch_size, shuffle=True, drop_last=True, num_workers=1, persistent_workers=True
    )
    model.train()
    epochs = clock.batches(batch for _ in range(math.ceil(steps / len(loader))) for batch in loader)
    for images, tokens in itertools.islice(epochs, steps):
        loss = criterion(*model(images, tokens))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
    return clock


def shipped_recipe(name: str, steps: int, threads: int, workers: int = 1) -> Recipe:
    """A shipped recipe on the embedded pairs, with nothing but steps to spend its time on."""
    batch_size = load_recipe(name).schedule.batch_size
    fields = [f"data.train={TRAIN}", "data.holdout=0", f"data.workers={workers}", "evaluation.every=1"]
    fields += ["engine.device=cpu", "engine.precision=float32", f"engine.threads={threads}"]  # as the peer
    return load_recipe(name, [*fields, f"schedule.pairs_seen={steps * batch_size}"])


def run_declip(recipe: Recipe, parts: Iterable[tuple[str, Any, str]] = ()) -> Clock:
    """`declip train` itself; `parts` are functions to time, as (name of the part, owner, attribute)."""
    clock, make_loader = Clock(), loop.make_loader
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(mock.patch.object(loop, "make_loader", lambda *args: clock.batches(make_loader(*args))))
        for part, owner, attribute in parts:
            stack.enter_context(mock.patch.object(owner, attribute, clock.timed(part, getattr(owner, attribute))))
        loop.train(recipe, Path(folder) / "run", quiet=True)
    return clock


def compare(steps: int, threads: int, rounds: int, peer: str) -> dict[str, Any]:
    """Rounds of the loops by turns; the median, least and most of every figure and of the ratios within a round."""
    recipes = {name: shipped_recipe(name, steps, threads) for name in ("clip", "declip")}
    clip, declip = recipes.values()
    if (model_config(clip.model), clip.schedule.batch_size) != (model_config(declip.model), declip.schedule.batch_size):
        sys.exit("The recipes clip and declip differ in towers or batch size: their speeds do not compare.")
    loops: dict[str, Callable[[], Clock]] = {"open_clip": lambda: run_open_clip(clip, steps)} if peer != "none" else {}
    loops |= {name: lambda recipe=recipe: run_declip(recipe) for name, recipe in recipes.items()}  # type: ignore[misc]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
    for number in range(rounds):
        for name, run in loops.items():
            torch.set_num_threads(threads)
            gc.collect()
            figures = run().figures(clip.schedule.batch_size)
            runs[name].append(figures)
            console.print(f"round {number + 1} of {rounds}, {NAMES[name]}: {figures['pairs_per_second']:.0f} pairs/s")
    result: dict[str, Any] = {
        "batch_size": clip.schedule.batch_size,
        "loops": {name: {key: _spread([run[key] for run in rows]) for key in rows[0]} for name, rows in runs.items()},
        "declip_step_over_clip": _ratio(runs["declip"], runs["clip"], "step_seconds"),
    }
    if peer != "none":
        result["clip_over_open_clip"] = _ratio(runs["clip"], runs["open_clip"], "pairs_per_second")
    return result


def _ratio(ours: list[dict[str, float]], other: list[dict[str, float]], figure: str) -> dict[str, float]:
    return _spread([one[figure] / two[figure] for one, two in zip(ours, other, strict=True)])


def _spread(values: list[float]) -> dict[str, float]:
    return {name: round(f(values), 4) for name, f in (("median", statistics.median), ("min", min), ("max", max))}


def start_up(times: int) -> dict[str, dict[str, float]]:
    """Wall-clock seconds of a whole Python process that only starts the package."""
    seconds: dict[str, list[float]] = {name: [] for name in START_UPS}
    for _ in range(times):
        for name, arguments in START_UPS.items():
            begun = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - begun)
    return {name: _spread(values) for name, values in seconds.items()}


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target that was measured, and whether it is met."""
    rows = [("DeCLIP, time of a step over CLIP's", "at most", DECLIP_STEP, result["declip_step_over_clip"])]
    rows += [(f"{name}, seconds", "at most", START_UP, spread) for name, spread in result["start_up"].items()]
    if "clip_over_open_clip" in result:
        ratio = result["clip_over_open_clip"]
        rows.insert(0, ("CLIP, pairs/s over the open_clip loop's", "at least", FASTER_THAN_OPEN_CLIP, ratio))
    targets = []
    for name, side, limit, spread in rows:
        met = spread["median"] >= limit if side == "at least" else spread["median"] <= limit
        targets.append({"target": name, "limit": f"{side} {limit:g}", "value": spread["median"], "met": met})
    return targets


def show(result: dict[str, Any]) -> None:
    """Tables for people, on stderr."""
    table = Table("", title=f"batches of {result['batch_size']}, {result['machine']['threads']} CPU threads")
    for heading in ("pairs/s, median (min–max)", "ms/step", "waiting", "start, s"):
        table.add_column(heading, justify="right")
    for name, figures in result["loops"].items():
        speed = "{median:.0f} ({min:.0f}–{max:.0f})".format(**figures["pairs_per_second"])
        step, waiting, start = (figures[key]["median"] for key in list(figures)[1:])
        table.add_row(NAMES[name], speed, f"{1e3 * step:.0f}", f"{waiting:.0%}", f"{start:.1f}")
    console.print(table)
    table = Table("target", "limit", "median", "")
    for row in result["targets"]:
        table.add_row(row["target"], row["limit"], f"{row['value']:.2f}", "met" if row["met"] else "[red]missed")
    console.print(table)


def profile(steps: int, threads: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each part of a step, by recipe; batches are made in the training process here."""
    terms = ("Contrastive", "SimSiam", "MaskedLanguage", "NearestNeighbour")
    found = {}
    for name in ("clip", "declip"):
        recipe = shipped_recipe(name, steps, threads, workers=0)
        everywhere = [
            ("batch: views and tokens (in a loader process)", BatchMaker, "__getitem__"),
            ("pixels to normalised floats", dual_encoder.DualEncoder, "pixels"),
            ("image tower forward", dual_encoder, "encode_image"),
            ("text tower forward", dual_encoder, "encode_text"),
            ("backward", torch.Tensor, "backward"),
            ("AdamW", torch.optim.AdamW, "step"),
        ]
        parts = [*everywhere, ("gradient clipping", loop, "clip_gradients")]
        parts += [(f"term {term} forward", getattr(objective, term), "forward") for term in terms]
        clock = run_declip(recipe, parts)
        counted = clock.parts[clock.first : -1]  # nothing ends the last one
        if idle := [part for part, _, _ in everywhere if not all(part in step for step in counted)]:
            sys.exit(f"The step of recipe {name} no longer calls what is timed as {idle}: bring the list up to date.")
        whole = statistics.median(b - a for a, b in itertools.pairwise(clock.arrivals[clock.first :]))
        medians = {part: statistics.median(step.get(part, 0.0) for step in counted) for part, _, _ in parts}
        rows = {**medians, "all else": whole - sum(medians.values()), "whole step": whole}
        found[name] = {part: round(1e3 * seconds, 2) for part, seconds in rows.items()}
    return found


def markdown(found: dict[str, dict[str, float]]) -> str:
    """The profile as a Markdown table, parts that neither recipe has left out."""
    lines = ["| part of a step | CLIP, ms | share | DeCLIP, ms | share |", "|---|--:|--:|--:|--:|"]
    for part in found["clip"]:
        if any(rows[part] for rows in found.values()):
            cells = [f"{rows[part]:.1f} | {rows[part] / rows['whole step']:.0%}" for rows in found.values()]
            lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(named, platform.processor())
    versions = {name: version(name) for name in ("torch", "open_clip_torch", "torchvision", "numpy", "pillow")}
    return {"processor": processor, "cores": os.cpu_count(), "threads": threads, "versions": versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object on stdout")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument(
        "--peer", choices=("open_clip", "none"), default="open_clip", help="what to measure beside us (%(default)s)"
    )
    parser.add_argument("--profile", action="store_true", help="only measure where a step's time goes")
    parser.add_argument("--steps", type=int, default=60, help="steps a run, at least 3 (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the towers (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each loop takes its turn (%(default)s)")
    args = parser.parse_args()
    if args.steps < 3 or args.rounds < 1 or args.threads < 1:
        parser.error("--steps must be at least 3, --rounds and --threads at least 1")
    if args.profile:
        found = profile(args.steps, args.threads)
        print(json.dumps({"machine": machine(args.threads), "milliseconds": found}) if args.json else markdown(found))
        return 0
    result = {"machine": machine(args.threads), "steps": args.steps, "rounds": args.rounds}
    result |= compare(args.steps, args.threads, args.rounds, args.peer)
    result["start_up"] = start_up(times=max(5, args.rounds))
    result["targets"] = judge(result)
    show(result)
    if args.json:
        print(json.dumps(result))
    return int(args.check and not all(row["met"] for row in result["targets"]))


if __name__ == "__main__":
    sys.exit(main())
