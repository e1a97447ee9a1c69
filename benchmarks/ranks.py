"""Two processes beside one: speed on the same two cores, the share of the gather, bytes sent beside the formulas.

    python benchmarks/ranks.py [--recipe declip] [--batch 256] [--rounds 3] [--steps 6] [--json] [--check]

speed: whole steps (towers, terms, backward, optimizer) on batches made in advance, so that no loader takes a core; two
ranks with one thread each, and one process with two, by turns, processes of their own; the fastest step of all rounds
of each, since whatever else runs on the machine only makes steps slower, and never both in the same way.
gather: the terms' gathers of a step, forward and backward, alone and over and over, over the time of a step.
bytes: what each method's step hands to gathers and sums, counted, and by the formulas of docs/scale.md.
Needs an otherwise idle computer: two threads that must wait for one another suffer most from company.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from declip import ranks as collectives
from declip.data.batch import Batch
from declip.data.decoded import open_images
from declip.data.device_views import finish_views
from declip.data.loader import BatchMaker
from declip.demo import TRAIN
from declip.model.dual_encoder import DualEncoder
from declip.objectives.objective import build_objective
from declip.ranks import ALONE, Ranks
from declip.recipe import Recipe, load_recipe
from declip.training import batch_norm
from declip.training.distributed import News, agree, joined_ranks, share_gradients
from declip.training.optimizer import build_optimizer
from declip.training.pairs import open_pairs, used_tokens
from declip.training.step import Step

SPEED = 0.9  # at least: pairs a second of two processes over those of one with two threads
GATHER = 0.05  # at most: of a step, at batch 256
METHODS = ("clip", "siglip", "slip", "filip", "declip", "defilip")


def made_recipe(name: str, batch: int, *more: str) -> Recipe:
    fields = [f"data.train={TRAIN}", "data.holdout=0", "data.cache_gb=0", f"schedule.batch_size={batch}"]
    return load_recipe(name, [*fields, "engine.device=cpu", "engine.precision=float32", *more])


class Trainer:
    """A recipe's step on batches made in advance."""

    def __init__(self, recipe: Recipe, ranks: Ranks, batches: int) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.ranks = recipe, ranks
        pairs, _ = open_pairs(recipe.data)
        self.model = DualEncoder(recipe)
        if not hasattr(self.model.clip.visual, "transformer"):
            self.model.clip.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.objective = build_objective(recipe, self.model, used_tokens(recipe, pairs, self.model.tokenizer))
        if ranks.count > 1:
            batch_norm.synchronise(self.model, ranks)
            batch_norm.synchronise(self.objective, ranks)
        self.optimizer = build_optimizer([self.model, self.objective], recipe.optimizer)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.module = share_gradients(Step(self.model, self.objective, "float32", ranks), ranks)
        towers = self.model.image_size, self.model.context_length, self.model.tokenizer, self.model.full_captions
        images = open_images(pairs, recipe.data.cache_gb, 1)
        maker = BatchMaker(images, recipe, *towers, rank=ranks.rank, ranks=ranks.count)
        self.batches = [finish_views(maker.make(number)) for number in range(batches)]

    def step(self, batch: Batch) -> None:
        """As in the training loop."""
        loss, terms = self.module(batch)
        float(agree(self.ranks, loss, terms, News()).loss)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def seconds(self, steps: int) -> float:
        """Of a step: the fastest, the first two left out."""
        times = []
        for number in range(steps + 2):
            start = time.perf_counter()
            self.step(self.batches[number % len(self.batches)])
            times.append(time.perf_counter() - start)
        return min(times[2:])


def time_steps(rank: int, count: int, port: int, folder: str, name: str, batch: int, steps: int) -> None:
    """One rank, or the only process: seconds a step, and of its gathers."""
    torch.set_num_threads(1 if count == 2 else 2)
    recipe = made_recipe(name, batch)
    if count == 1:
        found = {"step": Trainer(recipe, ALONE, 2).seconds(steps)}
    else:
        _as_rank(rank, count, port)
        with joined_ranks(recipe) as ranks:
            trainer = Trainer(recipe, ranks, 2)
            found = {"step": trainer.seconds(steps), "gather": gather_seconds(trainer)}
            parameters = torch.zeros(sum(p.numel() for p in trainer.parameters))
            found["gradients"] = repeated(lambda: dist.all_reduce(parameters), 10)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))


def gather_seconds(trainer: Trainer) -> float:
    """All gathers of a step's terms, forward and backward, without what is computed between them."""
    calls: list[tuple[tuple[int, ...], torch.dtype, bool]] = []
    gather = collectives._Gather.apply

    def noted(part: Tensor, *rest: int) -> Tensor:
        calls.append((tuple(part.shape), part.dtype, part.requires_grad))
        return gather(part, *rest)  # type: ignore[no-any-return]

    with mock.patch.object(collectives._Gather, "apply", noted):
        trainer.step(trainer.batches[0])
    parts = [torch.zeros(shape, dtype=dtype, requires_grad=slopes) for shape, dtype, slopes in calls]

    def once() -> None:
        for part in parts:
            everything = trainer.ranks.gather(part)
            if part.requires_grad:
                everything.backward(everything.detach())

    return repeated(once, 20)


def repeated(function: Callable[[], object], times: int) -> float:
    """Median seconds; all ranks begin together each time."""
    found = []
    for _ in range(times):
        dist.barrier()
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


# Bytes


def counted_bytes(trainer: Trainer) -> dict[str, int]:
    """What one step of this rank hands to gathers and sums, and to the next rank; DDP's own come on top."""
    found = {"handed": 0, "passed": 0}

    def counting(kind: str, place: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found[kind] += args[place].numel() * args[place].element_size()
            return function(*args, **kwargs)

        return call

    trainer.step(trainer.batches[0])  # from the second step on the queue is not empty
    gather = counting("handed", 1, collectives.all_gather)
    with (
        mock.patch.object(collectives, "all_gather", gather),
        mock.patch.object(batch_norm, "all_gather", gather),
        mock.patch.object(dist, "all_reduce", counting("handed", 0, dist.all_reduce)),
        mock.patch.object(Ranks, "pass_on", counting("passed", 1, Ranks.pass_on)),
    ):
        trainer.step(trainer.batches[1])
    return found


def expected_bytes(trainer: Trainer) -> dict[str, int]:
    """The formulas of docs/scale.md, for this rank's b rows of the batch of N ranks."""
    recipe, ranks, batch = trainer.recipe, trainer.ranks, trainer.batches[1]
    words = patches = 0
    if recipe.terms.token_wise is not None:
        longest = torch.tensor(batch.tokens.shape[-1])
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        words, patches = int(longest), trainer.model.clip.visual.attnpool.positional_embedding.shape[0] - 1
    sent = term_bytes(recipe, ranks.count, len(batch.sample_ids), trainer.model.dim, words, patches)
    norms = 8 * norm_channels(trainer)
    return {
        # There, and back: gloo sums the gradients of all ranks' rows.
        "handed": (1 + ranks.count) * sent["exchanged"] + sent["gathered"] + sent["summed"] + 2 * norms,
        "passed": sent["passed"],
    }


def term_bytes(recipe: Recipe, count: int, rows: int, dim: int, words: int = 0, patches: int = 0) -> dict[str, int]:
    """What the terms have each of `count` ranks send in a step, by the formulas of docs/scale.md.

    exchanged: gathered, and as many bytes of gradients come back; gathered: without gradients; summed; passed: to the
    next rank. dim: of the joint embedding; words, patches: tokens of the longest caption and of an image
    """
    terms = recipe.terms.active()
    floats = gathered = passed = 0
    summed = 4 * (1 + len(terms) + 4)  # the agreement on each step
    sent: set[str] = set()  # text views, each gathered once
    for name, term in terms.items():
        if name == "contrastive":
            floats += (term.images + len(set(term.texts) - sent)) * rows * dim
            sent |= set(term.texts)
        if name == "sigmoid":
            passed += (2 * count - 1) * len(term.texts) * rows * dim * 4  # texts, and their gradients back home
        if name == "simclr":
            floats += 2 * rows * term.dim
        if name == "token_wise":
            if term.top_k is not None:
                words, patches = min(term.top_k, words), min(term.top_k, patches)
            cells = term.images * len(term.texts)
            floats += cells * rows * (words + patches) * term.dim
            gathered += cells * rows * words  # the mask
            summed += cells * 2 * 8  # how long the longest is
        if name == "masked_language":
            summed += 8
        if name == "nearest_neighbour":
            gathered += len(term.texts) * rows * (8 + 1) + 8 * rows  # places, which are found, ids
            gathered += len(set(term.enqueue or term.texts) - sent) * rows * dim * 4
    return {"exchanged": 4 * floats, "gathered": gathered, "summed": summed, "passed": passed}


def norm_channels(trainer: Trainer) -> int:
    """Channels of all batch norms that a step runs, each as often as it runs."""
    count = 0

    def add(_: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> None:
        nonlocal count
        count += given[0].shape[1]

    parts = [part for part in trainer.module.modules() if isinstance(part, batch_norm.BatchNorm)]
    hooks = [part.register_forward_hook(add) for part in parts]
    trainer.step(trainer.batches[0])
    for hook in hooks:
        hook.remove()
    return count


def count_bytes(rank: int, count: int, port: int, folder: str, batch: int) -> None:
    torch.set_num_threads(1)
    _as_rank(rank, count, port)
    found = {}
    with joined_ranks(made_recipe("clip", batch)) as ranks:
        for name in METHODS:
            trainer = Trainer(made_recipe(name, batch), ranks, 2)
            gradients = 4 * sum(p.numel() for p in trainer.parameters)
            counted = counted_bytes(trainer)
            found[name] = {"counted": counted, "formula": expected_bytes(trainer), "gradients": gradients}
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))


def _as_rank(rank: int, count: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")


def in_processes(function: Callable[..., None], count: int, *arguments: Any) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(function, (count, port, folder, *arguments), count)
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    rounds = []
    for _ in range(args.rounds):
        two = in_processes(time_steps, 2, args.recipe, args.batch, args.steps)
        one = in_processes(time_steps, 1, args.recipe, args.batch, args.steps)
        rounds.append({**two, "one_process": one["step"]})
        print(f"two processes {two['step']:.3f} s a step, one {one['step']:.3f} s", file=sys.stderr)
    found = {name: min(row[name] for row in rounds) for name in rounds[0]}
    return {
        "recipe": args.recipe,
        "batch": args.batch,
        "seconds": found,
        "rounds": rounds,
        "load": os.getloadavg()[0],
        "speed": found["one_process"] / found["step"],
        "gather_share": found["gather"] / found["step"],
        "bytes": in_processes(count_bytes, 2, 32),
    }


def missed_targets(found: dict[str, Any]) -> list[str]:
    missed = [f"bytes of {name}" for name, row in found["bytes"].items() if row["counted"] != row["formula"]]
    if found["speed"] < SPEED:
        missed.append("speed")
    if found["gather_share"] > GATHER:
        missed.append("gather")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--recipe", default="declip", help="a shipped recipe (%(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="pairs of the global batch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each takes its turn (%(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps a turn (%(default)s)")
    args = parser.parse_args()
    found = measure(args)
    missed = missed_targets(found)
    if args.json:
        print(json.dumps({**found, "cores": os.cpu_count(), "missed": missed}))
    else:
        seconds = found["seconds"]
        print(f"{args.recipe}, batch {args.batch}: two processes at {found['speed']:.2f} of one process's speed")
        print(f"a step {seconds['step']:.3f} s, gathers {1e3 * seconds['gather']:.1f} ms ({found['gather_share']:.1%})")
        print(f"summing all gradients, alone: {1e3 * seconds['gradients']:.1f} ms")
        for name, row in found["bytes"].items():
            sizes = "gathered {gathered:,}, summed {summed:,}, passed on {passed:,}".format(**row["counted"])
            same = "as by formula" if row["counted"] == row["formula"] else f"formula: {row['formula']}"
            print(f"{name}, 16 rows a rank, bytes: {sizes} ({same}); gradients {row['gradients']:,}")
        print("\n".join(f"MISSED {what}" for what in missed) or "All targets met.")
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
