"""What several processes do in the tests of distributed training: each function runs as one rank."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from conftest import TERMS, TINY
from made import batch, features
from torch import nn

from declip.data.decoded import Images, open_images
from declip.data.kept import Kept
from declip.data.loader import BatchMaker
from declip.data.sources import open_sources
from declip.errors import InputError, Preempted, RankLost
from declip.model.dual_encoder import DualEncoder
from declip.objectives.nearest_neighbour import NearestNeighbour
from declip.objectives.objective import build_objective
from declip.ranks import Ranks
from declip.recipe import Recipe, load_recipe
from declip.training import loop
from declip.training.average import WeightAverage
from declip.training.batch_norm import synchronise
from declip.training.distributed import (
    News,
    _compare_recipes,
    agree,
    draw_apart,
    joined_ranks,
    one_voice,
    share_gradients,
)
from declip.training.estimate import estimate
from declip.training.gradients import LossScale, clip_gradients
from declip.training.optimizer import build_optimizer
from declip.training.sharding import is_shard, load_optimizer, optimizer_state, shard, whole
from declip.training.step import Step, attention_kernel

BATCHES = (0, 1, 5)  # the last of another epoch, when the queue holds the same pairs
RESNET = ["model.image.layers=[1,1,1,1]", "model.image.width=8", "model.image.image_size=32"]
SIMCLR = ["terms.simclr.width=32", "terms.simclr.dim=16"]
TOP_3 = ["terms.token_wise.dim=8", "terms.token_wise.top_k=3"]
SHARD = ["engine.shard=true", "model.image.layers=3", "model.text.layers=3"]
SHARDED = ("engine.shard=true", "optimizer.ema=0")
TAUGHT = [
    *('terms.teacher_contrast.texts=["joined","single","single_2"]', "optimizer.ema_half_life=0.5"),
    *('terms.contrastive.texts=["joined","single"]', 'terms.teacher_contrast.teacher_texts=["joined","single"]'),
]
ROLL_BACK = ["engine.on_divergence=roll_back", "engine.skip_limit=0"]
# By name: the recipe of conftest, what is changed in it.
METHODS = {
    "clip": ("clip", ["model.logit_scale_cap=10"]),
    "clip, equal captions": ("clip", ["terms.contrastive.equal_captions=positives", "data.text.pool=first"]),
    "clip, a ResNet": ("clip", RESNET),
    "clip, mixed": ("clip", ["data.mix=0.5", "terms.contrastive.equal_captions=positives", "data.text.pool=first"]),
    "clip, taught": ("clip", ["terms.distillation.teacher=somebody", "terms.distillation.images=2"]),
    "declip": ("declip", ["terms.contrastive.multi_view=0.5"]),
    "declip, reference": (
        "declip",
        [
            *("terms.nearest_neighbour.exclude_own=false", "terms.nearest_neighbour.random_start=true", *SIMCLR),
            *('terms.nearest_neighbour.enqueue=["masked","augmented"]', "terms.masked_language.vocabulary=used"),
        ],
    ),
    "declip, recomputed": ("declip", ["engine.micro_batch=3", "engine.grad_checkpointing=true"]),
    "slip": ("clip", [*SIMCLR, "data.strong_images.flip=0.5"]),
    "filip": ("clip", ["terms.contrastive=none", "terms.token_wise.dim=8"]),
    "filip, top 3": ("clip", [*TOP_3, "terms.token_wise.images=2"]),
    "defilip": ("declip", [*TOP_3, "terms.token_wise.mask_padding=false"]),
    "clip, sharded": ("clip", [*SHARD, "model.logit_scale_cap=10"]),
    "clip, a ResNet, sharded": ("clip", ["engine.shard=true", *RESNET]),
    "declip, sharded": ("declip", SHARD),
    "declip, sharded, recomputed": ("declip", [*SHARD, "engine.micro_batch=3", "engine.grad_checkpointing=true"]),
    "defilip, sharded": ("declip", [*SHARD, *TOP_3]),
    "clip, convolved": ("clip", ["data.images.convolve=0.5", "terms.contrastive.images=2"]),
    "clip, bfloat16": ("clip", ["engine.precision=bfloat16"]),
    "clip, bfloat16, sharded": ("clip", ["engine.precision=bfloat16", "engine.shard=true"]),
    "siglip": ("clip", ["terms.contrastive=none", "terms.sigmoid.images=2", "model.logit_bias_init=-10"]),
    "siglip, equal captions": (
        "clip",
        [
            *("terms.contrastive=none", "terms.sigmoid.equal_captions=positives", "terms.sigmoid.per=images"),
            *('terms.sigmoid.texts=["caption","augmented"]', "data.text.equal=pair", "model.logit_bias_init=-3"),
        ],
    ),
    "taught by its average, a ResNet": (
        "clip",
        [
            *(*TAUGHT, "terms.teacher_contrast.own_view=false", "terms.teacher_contrast.local_images=1"),
            *(*RESNET, "terms.teacher_contrast.weights=[0.4,0.1,0.2,0.3]", "data.local_size=32"),
        ],
    ),
    "flair": (
        "clip",
        [
            *('terms.text_conditioned.texts=["single","single_2"]', "model.logit_bias_init=-3"),
            *("terms.contrastive=none", 'terms.sigmoid.texts=["single","single_2"]'),
        ],
    ),
    "cosmos": ("clip", [*TAUGHT, "terms.teacher_contrast.cross_attention=true", "data.text.sentences=true"]),
}

FOUR = ("declip", "declip, sharded", "siglip")  # of these, what four ranks compute is looked at too


def recipe_of(folder: Path, name: str, *overrides: str) -> Recipe:
    method, changes = METHODS[name]
    path = folder / f"{method}_{os.getpid()}.toml"
    path.write_text(f'name = "{method}"\n{TINY}\n{TERMS[method]}\n')
    return load_recipe(path, [f"data.train={str(folder / 'pairs.parquet')!r}", *changes, *overrides])


def steps_of(recipe: Recipe, ranks: Ranks) -> dict[str, Any]:
    """Losses and gradients on a few batches with the weights of the start, and the buffers after them."""
    torch.manual_seed(0)
    model = DualEncoder(recipe)
    objective = build_objective(recipe, model, torch.arange(0, 49408, 2).repeat_interleave(2).unique(), (5, 20.0))
    if ranks.count > 1 and recipe.engine.sync_batch_norm:
        synchronise(model, ranks)
        synchronise(objective, ranks)
    step: nn.Module = Step(model, objective, recipe.engine.precision, ranks)
    if "teacher_contrast" in objective.terms:
        step.average = WeightAverage([*model.parameters(), *objective.parameters()], 0.9)
        for number, tensor in enumerate(step.average.average):
            tensor.mul_(1 + 0.2 * (number % 3))  # what learns is not what teaches
    if ranks.count > 1 and recipe.engine.shard:
        shard(step, model.clip, torch.device("cpu"), ranks)
    step = share_gradients(step, ranks)
    optimizer = build_optimizer([model, objective], recipe.optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    unscaled = LossScale(torch.device("cpu"), moves=False)
    images = open_images(open_sources(recipe.data.train, recipe.data), 1, 1)
    towers = model.image_size, model.context_length, model.tokenizer, model.full_captions
    kept = lesson(images) if recipe.terms.distillation else None
    part = {"rank": ranks.rank, "ranks": ranks.count, "kept": kept, "local_size": model.local_size}
    maker = BatchMaker(images, recipe, *towers, **part)  # type: ignore[arg-type]
    named = [(name, p) for part in (model, objective) for name, p in part.named_parameters()]
    found: dict[str, Any] = {"losses": [], "gradients": []}
    for number in BATCHES:
        batch = maker.make(number)
        draw_apart(ranks, 0, number)
        step.zero_grad()
        loss, terms = step(batch)
        agreed = agree(ranks, loss, terms, News(((ranks.rank, "", ""),)))
        assert [pair[0] for pair in agreed.news.broken] == list(range(ranks.count))
        with attention_kernel(loss.device, recipe.engine.precision):
            loss.backward()
        sharded = {name: whole(p.grad).clone() for name, p in named if is_shard(p) and p.grad is not None}
        norm = clip_gradients(parameters, math.inf, ranks, unscaled)
        losses = {"loss": agreed.loss, **agreed.terms, "norm of the gradient": norm}
        found["losses"].append({name: float(value.detach()) for name, value in losses.items()})
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in named} | sharded
        found["gradients"].append(gradients)
    optimizer.step()
    found["optimizer"] = whole_states(optimizer)
    load_optimizer(optimizer, {**optimizer_state(optimizer), "state": found["optimizer"]})
    found["optimizer again"] = whole_states(optimizer)
    found["buffers"] = {name: t for part in (model, objective) for name, t in part.named_buffers()}
    return found


def lesson(images: Images) -> Kept:
    """What a teacher may have said, with images that it could not read."""
    random = np.random.default_rng(0)
    said = random.standard_normal((len(images.source), 5)), random.standard_normal((int(images.caption_ends[-1]), 5))
    pictures, texts = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in said)
    pictures[::7] = np.nan
    return Kept(teacher_images=pictures.astype(np.float16), teacher_texts=texts.astype(np.float16))


def whole_states(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, torch.Tensor]]:
    states = optimizer_state(optimizer)["state"]
    return {number: {name: whole(t).clone() for name, t in state.items()} for number, state in states.items()}


def as_rank(rank: int, count: int, port: int) -> None:
    """torchrun's variables, for one meeting of the ranks."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def spawn(function: Any, folder: Path, count: int = 2, meetings: int = 1) -> mp.ProcessContext:
    """`function(rank, count, folder, ports)` in `count` processes; a port for each meeting."""
    return mp.start_processes(  # type: ignore[no-any-return]
        function, (count, folder, free_ports(meetings)), count, join=False, start_method="spawn"
    )


def four_ranks(rank: int, count: int, folder: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    as_rank(rank, count, ports[0])
    with joined_ranks(recipe_of(folder, "clip")) as ranks:
        for name in FOUR:
            torch.save(steps_of(recipe_of(folder, name), ranks), folder / f"{name} {rank} of {count}.pt")


def two_ranks(rank: int, count: int, folder: Path, ports: list[int]) -> None:
    """Every method; whole runs; ones that go back, are dry, are stopped; last one in which rank 1 is killed."""
    torch.set_num_threads(1)
    left = iter(ports)
    loop.LOG_SECONDS = 0.0
    as_rank(rank, count, next(left))
    with joined_ranks(recipe_of(folder, "clip")) as ranks, one_voice(ranks):
        for name in METHODS:
            torch.save(steps_of(recipe_of(folder, name), ranks), folder / f"{name} {rank} of {count}.pt")
        torch.save(norms(ranks), folder / f"norms {rank}.pt")
        torch.save(queues(ranks), folder / f"queues {rank}.pt")
        try:
            _compare_recipes(recipe_of(folder, "clip", f"seed={rank}"), ranks)
        except InputError as error:
            (folder / f"odd {rank}").write_text(str(error))

    as_rank(rank, count, next(left))
    with redirect_stderr(io.StringIO()) as said:
        summary = loop.train(run_recipe(folder), folder / "two")
    (folder / f"summary {rank}.json").write_text(json.dumps({**summary, "said": said.getvalue()}))

    as_rank(rank, count, next(left))
    with spoilt_at(5 if rank == 1 else None):
        summary = loop.train(run_recipe(folder, *ROLL_BACK), folder / "rolled back", quiet=True)
    (folder / f"rolled back {rank}.json").write_text(json.dumps(summary))

    apart = "terms.nearest_neighbour.queue_per_rank=true"
    as_rank(rank, count, next(left))
    loop.train(run_recipe(folder, apart), folder / "apart", quiet=True)
    as_rank(rank, count, next(left))
    with contextlib.suppress(KeyboardInterrupt), signal_at(3, signal.SIGINT if rank == 0 else None):
        loop.train(run_recipe(folder, apart), folder / "apart, resumed", quiet=True)
    as_rank(rank, count, next(left))
    loop.train(run_recipe(folder, apart), folder / "apart, resumed", resume=True, quiet=True)

    for length in (64, 88):
        as_rank(rank, count, next(left))
        loop.train(prolonged_recipe(folder, length), folder / "prolonged", resume=length > 64, quiet=True)

    as_rank(rank, count, next(left))
    (folder / f"estimate {rank}.json").write_text(json.dumps(estimate(run_recipe(folder), price=3.0)))

    sharded_runs(rank, count, folder, left)
    ends = (("stopped", 3, signal.SIGINT), ("preempted", 3, signal.SIGTERM), ("killed", 6, signal.SIGKILL))
    for name, step, number in ends:
        as_rank(rank, count, next(left))
        try:
            with signal_at(step, number if rank == 1 else None):
                loop.train(run_recipe(folder), folder / name, quiet=True)
        except (KeyboardInterrupt, Preempted, RankLost) as error:
            (folder / f"{name} {rank}").write_text(str(error))
    os._exit(0)  # nothing is tidied up after a lost rank


def sharded_runs(rank: int, count: int, folder: Path, left: Iterator[int]) -> None:
    """One that goes back; one that is stopped; one that goes on where ranks that each held all have stopped."""
    as_rank(rank, count, next(left))
    with spoilt_at(5 if rank == 1 else None):
        loop.train(run_recipe(folder, *SHARDED, *ROLL_BACK), folder / "rolled back, sharded", quiet=True)
    for name, options in (("stopped, sharded", SHARDED), ("stopped, then sharded", SHARDED[1:])):
        as_rank(rank, count, next(left))
        with contextlib.suppress(KeyboardInterrupt), signal_at(3, signal.SIGINT if rank == 1 else None):
            loop.train(run_recipe(folder, *options), folder / name, quiet=True)
    as_rank(rank, count, next(left))
    loop.train(run_recipe(folder, *SHARDED), folder / "stopped, then sharded", resume=True, quiet=True)


def run_recipe(folder: Path, *more: str) -> Recipe:
    # AdamW makes a lot of what is nothing but rounding. Nothing is decoded in advance: a broken pair is met on the way.
    options = ["optimizer.kind=sgd", "optimizer.lr=0.05", "data.cache_gb=0", "data.broken_limit=0.1"]
    return recipe_of(folder, "declip", *options, "optimizer.ema=0.5", *more)


def prolonged_recipe(folder: Path, pairs: int) -> Recipe:
    constant = ["schedule.shape=constant", "schedule.warmup_pairs=16", "schedule.cooldown=0.25", "evaluation.every=1"]
    return run_recipe(folder, *constant, f"schedule.pairs_seen={pairs}")


def queues(ranks: Ranks) -> list[float]:
    """The nearest-neighbour loss of a few steps, each rank with a queue of its own."""
    term, losses = NearestNeighbour(8, 9, 2, ["caption"], per_rank=True), []
    for step in range(6):
        made, samples = features(batch=6, seed=step), batch(samples_of(step))
        part = slice(3 * ranks.rank, 3 * ranks.rank + 3)
        own = replace(made, image=made.image[:, part], text={"caption": made.text["caption"][part]}, ranks=ranks)
        losses.append(float(term(own, replace(samples, sample_ids=samples.sample_ids[part])).detach()))
    return losses


def samples_of(step: int) -> list[int]:
    """Few samples that come back again and again."""
    return torch.randperm(8, generator=torch.Generator().manual_seed(step))[:6].tolist()


def norms(ranks: Ranks) -> dict[str, Any]:
    """Batch norms over all ranks' rows, in float64: outputs, gradients, running statistics."""
    found = {}
    for shape in ((12, 5), (8, 5, 3, 2)):
        norm, rows, slopes = made_norm(shape)
        synchronise(norm, ranks)
        part = slice(ranks.rank * len(rows) // ranks.count, (ranks.rank + 1) * len(rows) // ranks.count)
        own = rows[part].clone().requires_grad_()
        output = norm(own)
        (output * slopes[part]).sum().backward()
        weights = {name: ranks.sum(p.grad) for name, p in norm.named_parameters() if p.grad is not None}
        found[shape] = (output.detach(), own.grad, weights, dict(norm.named_buffers()), norm.eval()(rows).detach())
    return found


def made_norm(shape: tuple[int, ...]) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = 1000 + torch.randn(shape, generator=generator, dtype=torch.float64)  # a mean that costs digits
    slopes = torch.randn(shape, generator=generator, dtype=torch.float64)
    norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1]).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2, generator=generator)
    return norm, rows, slopes


@contextlib.contextmanager
def spoilt_at(step: int | None) -> Iterator[None]:
    """Let the loss of one step be no number."""
    forward, left = Step.forward, iter(range(1, 1000))

    def spoiling(self: Step, batch: Any) -> Any:
        loss, terms = forward(self, batch)
        return loss * (math.nan if next(left) == step else 1), terms

    Step.forward = spoiling  # type: ignore[method-assign]
    try:
        yield
    finally:
        Step.forward = forward  # type: ignore[method-assign]


@contextlib.contextmanager
def signal_at(step: int, number: int | None) -> Iterator[None]:
    """Send this process a signal in the middle of a step."""
    forward, left = DualEncoder.forward, iter(range(1, 1000))

    def signalling(self: DualEncoder, batch: Any) -> Any:
        if next(left) == step and number is not None:
            os.kill(os.getpid(), number)
        return forward(self, batch)

    DualEncoder.forward = signalling  # type: ignore[method-assign]
    try:
        yield
    finally:
        DualEncoder.forward = forward  # type: ignore[method-assign]
