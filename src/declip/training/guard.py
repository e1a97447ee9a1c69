"""Steps that would spoil the weights are skipped and counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from declip.engine import Safety
from declip.errors import Diverged
from declip.training.gradients import LossScale

AVERAGED = 100  # about so many losses are averaged, and among so many steps the skipped ones are counted


class Guard:
    """Takes the optimizer's step unless the loss or its gradient is not finite, or the loss explodes.

    A skipped step leaves no trace in weights, optimizer, batch norm or queue. On CUDA all of it happens on the device:
    fused optimizers take no step where `found_inf` is 1, and what became of a step is read when the next one is queued
    already, so that the device never waits for it. On several ranks loss and norm must be the same on all of them.

    scale: what the loss was multiplied with. While it is above 1, gradients that overflow are its own doing: such steps
        are skipped, and it falls, but they are not counted.
    """

    def __init__(
        self, modules: list[nn.Module], optimizer: torch.optim.Optimizer, options: Safety, scale: LossScale
    ) -> None:
        self.optimizer, self.options, self.scale = optimizer, options, scale
        saved = {id(tensor) for module in modules for tensor in module.state_dict(keep_vars=True).values()}
        self.buffers = [buffer for module in modules for buffer in module.buffers() if id(buffer) in saved]
        self.before = [buffer.clone() for buffer in self.buffers]
        parameter = optimizer.param_groups[0]["params"][0]
        self.average, self.averaged = torch.zeros((2,), device=parameter.device).unbind()
        self.recent: list[int] = []  # the skipped among the last steps
        self.skipped = 0  # in the whole run
        self._unread: Callable[[], str | None] | None = None

    def before_forward(self) -> None:
        """Keep what the forward pass changes: batch norm's statistics and the queue."""
        if self.buffers:
            torch._foreach_copy_(self.before, self.buffers)

    @torch.no_grad()
    def step(self, number: int, loss: Tensor, norm: Tensor, terms: dict[str, Tensor]) -> str | None:
        """Take or skip the optimizer's step `number`.

        Says which step was skipped and why, which may be the one before (see `read`); None where none was.
        """
        loss, average = loss.detach(), self.average
        wrong, overflow = ~loss.isfinite(), ~norm.isfinite()
        if self.options.explosion:
            wrong |= (self.averaged > 0) & (loss > average + self.options.explosion)
        bad, counted = wrong | overflow, wrong | (overflow & (self.scale.value <= 1))
        self.scale.update(overflow)
        self.averaged = torch.where(bad, self.averaged, (self.averaged + 1).clamp(max=AVERAGED))
        self.average = torch.where(bad, average, average + (loss - average) / self.averaged.clamp(min=1))
        # A fused SGD that skips its very first step would leave its momentum unset.
        if not _waits(bad) and self.optimizer.state and self.optimizer.defaults.get("fused"):
            self._step_on_device(bad)
        elif not bad:
            self.optimizer.step()
        elif self.buffers:
            torch._foreach_copy_(self.buffers, self.before)
        flag = _read_later(counted)

        def reason() -> str | None:
            return _reason(number, loss, terms, average, self.options) if flag() else None

        earlier, self._unread = self._unread, reason
        found = self._note(number - 1, earlier)
        return self.read(number) if _waits(bad) else found

    def _step_on_device(self, bad: Tensor) -> None:
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        for buffer, before in zip(self.buffers, self.before, strict=True):
            buffer.copy_(torch.where(bad, before, buffer))

    def read(self, number: int) -> str | None:
        """What became of step `number`, the last one; waits for it. Raises Diverged where too many were skipped."""
        unread, self._unread = self._unread, None
        return self._note(number, unread)

    def _note(self, number: int, unread: Callable[[], str | None] | None) -> str | None:
        reason = unread() if unread else None
        if reason:
            self.skipped += 1
            self.recent = [step for step in self.recent if step > number - AVERAGED] + [number]
            if len(self.recent) > self.options.skip_limit:
                raise Diverged(f"{reason}, and {self._counted()}" if self.options.skip_limit else reason)
        return reason

    def _counted(self) -> str:
        limit = self.options.skip_limit
        return f"{len(self.recent)} of the last {AVERAGED} steps were skipped, more than engine.skip_limit = {limit}"

    def state(self) -> dict[str, Any]:
        return {
            "average": self.average,
            "averaged": self.averaged,
            "recent": list(self.recent),
            "skipped": self.skipped,
            **({"scale": self.scale.state()} if self.scale.moves else {}),
        }

    def restore(self, state: dict[str, Any]) -> None:
        device = self.average.device
        self.average, self.averaged = state["average"].to(device), state["averaged"].to(device)
        self.recent, self.skipped, self._unread = list(state["recent"]), state["skipped"], None
        if self.scale.moves:
            self.scale.restore(state["scale"])


def _waits(tensor: Tensor) -> bool:
    """Whether a tensor's value is there as soon as asked for, or should be; MPS has no fused step that can be told."""
    return tensor.device.type != "cuda"


def _read_later(flag: Tensor) -> Callable[[], bool]:
    """Copy a flag to the host without waiting; the function that is given waits for this copy alone."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(flag, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def read() -> bool:
        copied.synchronize()
        return bool(host)

    return read


def _reason(number: int, loss: Tensor, terms: dict[str, Tensor], average: Tensor, options: Safety) -> str:
    bad = [name for name, value in terms.items() if not math.isfinite(float(value.detach()))]
    names = ", ".join(bad or terms)
    if bad or not math.isfinite(float(loss)):
        return f"The loss is not a number at step {number} (term {names})"
    if options.explosion and float(loss) > float(average) + options.explosion:
        above = f"more than engine.explosion = {options.explosion:g} above its average of {float(average):.4g}"
        return f"The loss of {float(loss):.4g} at step {number} is {above}"
    return f"The gradient of the loss is not a number at step {number} (term {names})"
