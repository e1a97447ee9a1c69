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
import importlib.metadata
import io
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from declip.data.loader import BatchMaker
from declip.data.sources import open_sources
from declip.demo import TRAIN
from declip.model import dual_encoder
from declip.model.towers import model_config
from declip.objectives import objective
from declip.recipe import Data, Recipe, load_recipe
from declip.training import loop

FASTER_THAN_OPEN_CLIP = 1.3  # at least: pairs a second of our CLIP over the peer's
DECLIP_STEP = 1.8  # at most: seconds a step of DeCLIP over our CLIP's
START_UP = 0.3  # at most: seconds of `declip --help` and of `import declip`
START_UPS = {"python -m declip --help": ["-m", "declip", "--help"], "import declip": ["-c", "import declip"]}
NAMES = {"open_clip": "open_clip loop", "clip": "declip, recipe clip", "declip": "declip, recipe declip"}
PEERS = ("open_clip", "none")

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
            try:
                return function(*args, **kwargs)
            finally:
                if self.parts:
                    self.parts[-1][part] += time.perf_counter() - begun

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


# The peer ----------------------------------------------------------------------------------------------------------


class OpenClipPairs(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pairs as a user of open_clip reads them: PIL, torchvision's transforms, open_clip's tokenizer."""

    def __init__(self, recipe: Recipe) -> None:
        from torchvision import transforms

        source = open_sources(TRAIN, Data())
        self.pairs = [(source[index].image, source[index].captions) for index in range(len(source))]
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(recipe.model.image.image_size, scale=recipe.data.images.crop_scale),
                transforms.ToTensor(),
                transforms.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
            ]
        )
        self.tokenize = open_clip.SimpleTokenizer(context_length=recipe.model.text.context_length)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        from PIL import Image

        image, captions = self.pairs[index]
        pixels = self.transform(Image.open(io.BytesIO(image)).convert("RGB"))
        return pixels, self.tokenize([random.choice(captions)])[0]


def run_open_clip(recipe: Recipe, steps: int) -> Clock:
    """Train the recipe's towers as open_clip's own loop does, in plain float32 with PyTorch's default AdamW."""
    clock = Clock()
    torch.manual_seed(recipe.seed)
    config = model_config(recipe.model)
    vision = {**config["vision_cfg"], "patch_dropout": recipe.model.patch_dropout}
    model = open_clip.model.CLIP(**{**config, "vision_cfg": vision}, init_logit_scale=recipe.model.logit_scale_init)
    loss = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.lr)
    loader = DataLoader(
        OpenClipPairs(recipe),
        batch_size=recipe.schedule.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=1,
        persistent_workers=True,
    )
    model.train()
    batches = clock.batches(batch for _ in range(math.ceil(steps / len(loader))) for batch in loader)
    for _, (images, texts) in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        image_features, text_features, logit_scale = model(images, texts)
        loss(image_features, text_features, logit_scale).backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
    return clock


# Ours --------------------------------------------------------------------------------------------------------------


def shipped_recipe(name: str, steps: int, threads: int, workers: int = 1) -> Recipe:
    """A shipped recipe on the embedded pairs, with nothing but steps to spend its time on."""
    batch_size = load_recipe(name).schedule.batch_size
    fields = {
        "data.train": TRAIN,
        "data.holdout": 0,
        "data.workers": workers,
        "schedule.pairs_seen": steps * batch_size,
        "evaluation.every": 1,
        "engine.device": "'cpu'",
        "engine.precision": "'float32'",  # as the peer
        "engine.threads": threads,
    }
    return load_recipe(name, [f"{path}={value}" for path, value in fields.items()])


def run_declip(recipe: Recipe, parts: Iterable[tuple[str, Any, str]] = ()) -> Clock:
    """`declip train` itself; `parts` are functions to time, as (name of the part, owner, attribute)."""
    clock, make_loader = Clock(), loop.make_loader
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(loop, "make_loader", lambda *args, **kwargs: clock.batches(make_loader(*args, **kwargs)))
        )
        for part, owner, attribute in parts:
            stack.enter_context(mock.patch.object(owner, attribute, clock.timed(part, getattr(owner, attribute))))
        loop.train(recipe, Path(folder) / "run", quiet=True)
    return clock


# Side by side ------------------------------------------------------------------------------------------------------


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
            figures = run().figures(clip.schedule.batch_size)
            runs[name].append(figures)
            gc.collect()
            console.print(f"round {number + 1} of {rounds}, {NAMES[name]}: {figures['pairs_per_second']:.0f} pairs/s")
    result: dict[str, Any] = {
        "batch_size": clip.schedule.batch_size,
        "steps": steps,
        "context_length": clip.model.text.context_length,
        "loops": {name: {figure: _spread([run[figure] for run in rows]) for figure in rows[0]} for name, rows in runs.items()},
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
    rows = [("declip step over clip step, at most", result["declip_step_over_clip"]["median"], DECLIP_STEP, -1)]
    if "clip_over_open_clip" in result:
        value = result["clip_over_open_clip"]["median"]
        rows.insert(0, ("clip pairs/s over open_clip, at least", value, FASTER_THAN_OPEN_CLIP, 1))
    rows += [(f"{name} in seconds, at most", spread["median"], START_UP, -1) for name, spread in result["start_up"].items()]
    return [{"target": name, "limit": limit, "value": v, "met": sign * (v - limit) >= 0} for name, v, limit, sign in rows]


def show(result: dict[str, Any]) -> None:
    """Tables for people, on stderr."""
    table = Table("", title=f"Batches of {result['batch_size']}, {result['machine']['threads']} CPU threads: median (min–max)")
    for heading in ("pairs/s", "ms/step", "waiting for data", "seconds to first batch"):
        table.add_column(heading, justify="right")
    for name, figures in result["loops"].items():
        speed, step, waiting, first = figures.values()
        spread = f"{speed['median']:.0f} ({speed['min']:.0f}–{speed['max']:.0f})"
        cells = (f"{step['median'] * 1e3:.0f}", f"{waiting['median']:.0%}", f"{first['median']:.1f}")
        table.add_row(NAMES[name], spread, *cells)
    console.print(table)
    table = Table("target", "limit", "measured", "")
    for row in result["targets"]:
        table.add_row(row["target"], f"{row['limit']:g}", f"{row['value']:.2f}", "met" if row["met"] else "[red]missed[/red]")
    console.print(table)


# Where the time goes -----------------------------------------------------------------------------------------------


def profile(steps: int, threads: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each part of a step, by recipe; batches are made in the training process here."""
    terms = ("Contrastive", "SimSiam", "MaskedLanguage", "NearestNeighbour")
    parts = [
        ("batch: views and tokens (in a loader process)", BatchMaker, "__getitem__"),
        ("pixels to normalised floats", dual_encoder.DualEncoder, "pixels"),
        ("image tower forward", VisionTransformer, "forward"),
        ("text tower forward", dual_encoder, "encode_text"),
        *((f"term {name} forward", getattr(objective, name), "forward") for name in terms),
        ("backward", torch.Tensor, "backward"),
        ("gradient clipping", torch.nn.utils, "clip_grad_norm_"),
        ("AdamW", torch.optim.AdamW, "step"),
    ]
    found = {}
    for name in ("clip", "declip"):
        clock = run_declip(shipped_recipe(name, steps, threads, workers=0), parts)
        counted = clock.parts[clock.first : -1]  # nothing ends the last one
        ends = zip(clock.arrivals[clock.first :], clock.arrivals[clock.first + 1 :], strict=False)
        whole = statistics.median(end - begin for begin, end in ends)
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
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("torch", "open_clip_torch", "torchvision", "numpy", "pillow")
    versions = {d.name: d.version for d in map(importlib.metadata.distribution, packages)}
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": versions,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object on stdout")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--peer", choices=PEERS, default=PEERS[0], help="what to measure beside us (%(default)s)")
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
    result = {"machine": machine(args.threads), **compare(args.steps, args.threads, args.rounds, args.peer)}
    result["start_up"] = start_up(times=max(5, args.rounds))
    result["targets"] = judge(result)
    show(result)
    if args.json:
        print(json.dumps(result))
    return int(args.check and not all(row["met"] for row in result["targets"]))


if __name__ == "__main__":
    sys.exit(main())
