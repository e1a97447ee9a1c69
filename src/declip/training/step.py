"""From a batch to the loss: towers in the precision asked for, terms in float32."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from declip.data.batch import Batch
from declip.errors import InputError, first_line
from declip.model.dual_encoder import Features
from declip.model.recompute import noting_nothing
from declip.objectives.objective import Objective
from declip.ranks import Ranks
from declip.training.average import WeightAverage


class Step(nn.Module):
    """Towers and terms as one module, so that DistributedDataParallel and FSDP2 see all parameters at once."""

    def __init__(self, model: nn.Module, objective: Objective, precision: str, ranks: Ranks) -> None:
        super().__init__()
        self.model, self.objective, self.precision, self.ranks = model, objective, precision, ranks
        self.average: WeightAverage | None = None  # where a term learns from it

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The total and each term: this rank's, whose mean over the ranks is that of the global batch."""
        taught: dict[str, Any] = {} if self.average is None else self._by_average(batch, self.average)
        with autocast(batch.images.device, self.precision):
            features: Features = self.model(batch)
        loss, terms = self.objective(replace(features, ranks=self.ranks, **taught), batch)
        return loss, terms

    @torch.no_grad()
    def _by_average(self, batch: Batch, average: WeightAverage) -> dict[str, Tensor]:
        """What the average makes of the views that it is to see: embeddings [views, batch, dim], normalised."""
        term = self.objective.terms["teacher_contrast"]
        with noting_nothing(self.model), average.applied(), autocast(batch.images.device, self.precision):
            found: Features = self.model(batch.part(term.images, term.teacher_texts))  # type: ignore[arg-type]
        return {"teacher_image": found.unit_image, "teacher_text": found.unit_texts(found.text.keys())}  # type: ignore[arg-type]


def pick_device(name: str) -> torch.device:
    """The device a recipe names; `auto` takes CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"engine.device = {name!r} cannot be used: {first_line(error)}.") from None


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """What a recipe's precision means on a device: `auto` is bfloat16 where the device computes in it natively."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_computes_bfloat16(device)
        return torch.bfloat16 if native else torch.float32
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Autocast in bfloat16 or float16 where that is the precision to compute in."""
    dtype = compute_dtype(device, precision)
    half = dtype != torch.float32
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, dtype if half else None, enabled=half))
        stack.enter_context(attention_kernel(device, precision))
        yield


@contextlib.contextmanager
def attention_kernel(device: torch.device, precision: str) -> Iterator[None]:
    """The kernel of attention in here; for the backward pass too, where some of it may be computed again."""
    with contextlib.ExitStack() as stack:
        if device.type == "cpu" and compute_dtype(device, precision) != torch.float32:
            # PyTorch's flash attention for CPUs takes two to five times longer than plain products in bfloat16.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@functools.cache
def _cpu_computes_bfloat16(device: torch.device) -> bool:
    # Without these instructions bfloat16 is emulated, about twenty times slower than float32.
    cpuinfo = Path("/proc/cpuinfo")
    if device.type != "cpu" or not cpuinfo.is_file():
        return False
    return bool({"amx_bf16", "avx512_bf16"} & set(cpuinfo.read_text().split()))
