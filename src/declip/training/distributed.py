"""Several processes that train one model: set-up from torchrun's environment, what they agree on, and their end.

Only rank 0 writes and speaks. A rank that fails ends, and the others notice when its connections close: nothing has to
be agreed on for that. What all must do in the same step (stop, count broken pairs) travels with the loss.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from declip.errors import InputError, RankLost, first_line
from declip.ranks import ALONE, Ranks
from declip.recipe import Recipe
from declip.training.checkpoint import first_difference
from declip.training.sharding import is_sharded

# How long a rank waits for another that lives. One that has ended is noticed at once; judging and saving take a while.
PATIENCE = timedelta(minutes=30)
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
Broken = tuple[tuple[int, str, str], ...]
Any_ = TypeVar("Any_")


def ranks_asked(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks torchrun, or whatever sets its variables, has started; 1 without."""
    return int(environment["WORLD_SIZE"]) if environment.get("RANK") else 1


@contextlib.contextmanager
def joined_ranks(recipe: Recipe) -> Iterator[Ranks]:
    """This process's place among those of the run, all of which must have the same recipe.

    Raises InputError where they do not, or where they cannot meet, and RankLost where one of them ends.
    """
    if ranks_asked() == 1:
        if recipe.engine.shard:
            raise InputError(
                "engine.shard shares a model out among several ranks, and there is one: start more (--gpus N or "
                "torchrun), or set engine.shard=false."
            )
        yield ALONE
        return
    ranks = Ranks(int(os.environ["RANK"]), ranks_asked())
    if recipe.schedule.batch_size % ranks.count:
        raise InputError(
            f"schedule.batch_size = {recipe.schedule.batch_size} cannot be split into {ranks.count} equal parts, one "
            f"for each rank: set it to a multiple of {ranks.count}."
        )
    own = recipe.schedule.batch_size // ranks.count
    if recipe.data.mix and own % 2:
        raise InputError(
            f"data.mix mixes the pictures of a rank two by two, and each has {own}: set "
            f"schedule.batch_size to a multiple of {2 * ranks.count}."
        )
    device = local_device(recipe.engine.device)
    try:
        _meet(device)
        _compare_recipes(recipe, ranks)
        yield ranks
        dist.destroy_process_group()
    except RuntimeError as error:
        # After a failure nothing is torn down: that would wait for those who are gone.
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        gone = any(sign in str(error) for sign in GONE)
        why = "Another rank has ended" if gone else f"The ranks cannot reach one another ({first_line(error)})"
        raise RankLost(f"{why}. To go on from the last checkpoint: the same command with --resume.") from None


def local_device(name: str) -> str:
    """The device of this rank, where a recipe says `auto` or `cuda`: the GPU of its number on this machine.

    Raises InputError where there is none for it.
    """
    if ranks_asked() == 1 or name not in ("auto", "cuda"):
        if ranks_asked() > 1 and name != "cpu":
            raise InputError(f"engine.device = {name!r} is one device, for one rank: set it to cuda, cpu or auto.")
        return name
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if not gpus and name == "auto":
        return "cpu"
    if local >= gpus:
        raise InputError(
            f"This machine has {gpus} GPUs, and more ranks were started on it: start {gpus or 'none'}, or set "
            "engine.device=cpu."
        )
    return f"cuda:{local}"


def _meet(device: str) -> None:
    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # small objects travel without the GPU
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except ValueError as error:
        raise InputError(f"The ranks cannot meet: {first_line(error)}. Start them with torchrun or --gpus.") from None
    except dist.DistError as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise InputError(
                f"The ranks cannot meet at {where}, the port is in use: give another (MASTER_PORT)."
            ) from None
        raise InputError(f"The ranks cannot meet at {where}: {first_line(error)}.") from None
    global _store
    _store = dist.distributed_c10d._get_default_store()


def _compare_recipes(recipe: Recipe, ranks: Ranks) -> None:
    if difference := first_difference(broadcast(recipe, ranks), recipe):
        raise InputError(
            f"Rank {ranks.rank} has another recipe than rank 0 ({difference}): start all with the same one."
        )


_store: Any = None


def speaks() -> bool:
    """Whether this process is the one to say what has gone wrong: the first rank that fails.

    Before the ranks have met each machine's first speaks: what goes wrong then goes wrong everywhere.
    """
    if ranks_asked() == 1:
        return True
    if _store is None:
        return int(os.environ.get("LOCAL_RANK", 0)) == 0
    try:
        return bool(_store.add("declip_failures", 1) == 1)
    except RuntimeError:
        return os.environ["RANK"] == "1"  # rank 0 kept the count, and is gone


@contextlib.contextmanager
def one_voice(ranks: Ranks) -> Iterator[None]:
    """What is said on stderr in here, all ranks say: only rank 0 is heard."""
    with contextlib.ExitStack() as stack:
        if ranks.rank:
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        yield


def broadcast(value: Any_, ranks: Ranks) -> Any_:
    """Rank 0's value, on every rank."""
    if ranks.count == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def collect(own: Tensor, ranks: Ranks) -> list[Tensor]:
    """The tensors of all ranks, of equal shape, on rank 0's host; nothing on the others."""
    own = own.cpu()
    parts = [torch.empty_like(own) for _ in range(ranks.count)] if ranks.rank == 0 else []
    dist.gather(own, parts or None)
    return parts


def share_gradients(step: nn.Module, ranks: Ranks) -> nn.Module:
    """The module in DistributedDataParallel, which averages the ranks' gradients while they are computed.

    One that is sharded does so by itself.
    """
    if ranks.count == 1 or is_sharded(step):
        return step
    # Some parameters may have no part in the loss, say a projection that no term uses. In a graph that stays the same
    # DDP finds them once. Buffers are the same on all ranks, or each rank's own.
    # Convolutions give gradients in another order of dimensions, which DDP copies; it says so for 1 × 1 kernels.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # Buffers of a rank's own would all start as rank 0's.
    own = [f"{name}.{buffer}" for name, part in step.named_modules() for buffer in getattr(part, "own_buffers", ())]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, own)  # type: ignore[no-untyped-call]
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in names)  # it was renamed
    options: dict[str, Any] = {"gradient_as_bucket_view": True, "static_graph": True, buffers: False}
    return DistributedDataParallel(step, **options)


def draw_apart(ranks: Ranks, seed: int, step: int) -> None:
    """Let this rank's dropout of this step differ from the others'. Rank 0 goes on as a single process does.

    A function of the step, so that a checkpoint has to hold rank 0's generator alone.
    """
    if ranks.rank:
        torch.manual_seed(hash((seed, ranks.rank, step)))


@dataclass(frozen=True)
class News:
    """What a rank has to tell: broken pairs, a checkpoint that falls due, Ctrl-C (`stop`), SIGTERM (`preempted`)."""

    broken: Broken = ()
    due: bool = False
    stop: bool = False
    preempted: bool = False


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of a step: its loss and terms over the global batch, without gradients, and all news."""

    loss: Tensor
    terms: dict[str, Tensor]
    news: News


def agree(ranks: Ranks, loss: Tensor, terms: dict[str, Tensor], news: News) -> Agreed:
    """Put the ranks' losses and news together: two small all-reduces a step, one of a few numbers on the hosts.

    Nobody waits for a GPU here.
    """
    values = torch.stack([loss, *terms.values()]).detach().float()
    if ranks.count > 1:
        values = ranks.sum(values) / ranks.count
        told = torch.tensor([len(news.broken), news.due, news.stop, news.preempted], dtype=torch.int32)
        broken, due, stop, preempted = ranks.sum(told).tolist()
        parts: list[Any] = [news.broken] * ranks.count
        if broken:
            dist.all_gather_object(parts, news.broken)
        news = News(tuple(pair for part in parts for pair in part) if broken else (), due > 0, stop > 0, preempted > 0)
    mean, *means = values.unbind()
    return Agreed(mean, dict(zip(terms, means, strict=True)), news)


def part(ranks: Ranks) -> None:
    """Leave together, where all have agreed to stop: rank 0 comes last, and whoever started them ends all with one."""
    if ranks.count > 1:
        broadcast(None, ranks)
        dist.destroy_process_group()


def leave(code: int) -> int:
    """The exit code where all is well, else the end of this process, without the tidying up that waits for others.

    At a normal exit gloo's threads, which know nothing of a failure, would abort.
    """
    if code or dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def only_first_prints() -> None:
    """Leave stdout to rank 0: the others' results are the same."""
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process lives)
