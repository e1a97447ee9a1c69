"""Checkpoints are copied in the training step and written behind its back."""

from __future__ import annotations

import errno
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from declip.errors import InputError
from declip.files import flush_to_disk, remove_temporary, save_weights
from declip.training.checkpoint import METRICS, checkpoints, step_of, write_checkpoint
from declip.training.sharding import whole

_LAST_IN_LINE = 19  # the least of the priorities that Unix knows


class Saver:
    """Writes one checkpoint at a time in a thread of its own. Use as a context manager.

    The copies that it writes from are made anew only where their shapes change, so they hold memory of the size of a
    checkpoint all the time: fresh memory would take several times as long to fill.

    keep: how many are kept, the newest
    pinned: the step of one that is kept as well, from which the run can be prolonged
    yields: write only while the processor has nothing better to do, as where it also computes the steps: these wait for
        the slowest of their threads, and would take twice as long beside one that writes (on Linux)
    """

    def __init__(self, out: Path, keep: int, pinned: int | None = None, yields: bool = False) -> None:
        self.out, self.keep, self.pinned = out, keep, pinned
        self._copies: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint", _yield_to_all if yields else None)
        self._writing: Future[None] | None = None
        remove_temporary(out / "checkpoints")

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()  # an error is under way already, or `wait` was called

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written; raises what went wrong with the last one."""
        if self._writing is not None and not self._writing.done():
            return True
        self.wait()
        return False

    def wait(self) -> None:
        """Until all is written. Raises OSError where the disk is full, InputError where nothing can be written."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = error.filename or self.out / "checkpoints"
            raise InputError(
                f"{where} cannot be written ({error.strerror}): the checkpoints made before are kept; make the folder "
                "writable and go on with --resume."
            ) from None

    def save(self, step: int, state: dict[str, Any], best: dict[str, dict[str, Tensor]]) -> None:
        """Copy the state of `step` and write it in the background, after the one that is being written.

        best: weights by file name within the run folder, where they are the best so far
        """
        self.wait()
        copied = self._copy({"state": state, "best": best})
        ready = None
        if torch.cuda.is_available():  # the copies are queued behind the step; only the thread waits for them
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        self._writing = self._thread.submit(self._write, step, copied, ready)

    def _write(self, step: int, copied: dict[str, Any], ready: torch.cuda.Event | None) -> None:
        if ready is not None:
            ready.synchronize()
        for name, weights in copied["best"].items():
            save_weights(self.out / name, weights, durable=True)
        if (self.out / METRICS).is_file():
            flush_to_disk(self.out / METRICS)  # a checkpoint vouches for the rows up to its step
        write_checkpoint(self.out, step, copied["state"])
        for old in checkpoints(self.out)[self.keep :]:
            if step_of(old) != self.pinned:
                old.unlink(missing_ok=True)

    def _copy(self, value: Any, path: str = "") -> Any:
        if isinstance(value, dict):
            return {name: self._copy(item, f"{path}.{name}") for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._copy(item, f"{path}.{place}") for place, item in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        copy, value = self._copies.get(path), whole(value.detach())
        if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
            pinned = value.device.type == "cuda"  # else the copy would wait for the device
            copy = self._copies[path] = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
        return copy.copy_(value, non_blocking=value.device.type == "cuda")


def _yield_to_all() -> None:
    """Let every other thread of the machine go before this one."""
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LAST_IN_LINE)


class NoSaver(Saver):
    """Of the ranks beside the first: writes nothing, but gives its parts of what is sharded."""

    busy = False

    def __init__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> None:
        pass

    def save(self, step: int, state: dict[str, Any], best: dict[str, dict[str, Tensor]]) -> None:
        self._copy({"state": state, "best": best})

    def _copy(self, value: Any, path: str = "") -> Any:
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            self._copy(item)
        if isinstance(value, Tensor):
            whole(value.detach())
