"""Loader processes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from multiprocessing import context
from typing import Any

from torch.utils.data import DataLoader, Dataset

from declip.memory import give_back_freed_memory


def read_ahead(items: Dataset[Any], order: Iterable[Any], workers: int, **options: Any) -> DataLoader[Any]:
    """`items` in that order, each as it is, made by `workers` processes ahead of time; 0: by this one.

    On Linux they are forked: nothing is copied or imported anew. options: DataLoader's own
    """
    if workers:
        give_back_freed_memory()
        options["multiprocessing_context"] = _forking() if sys.platform == "linux" else None
    return DataLoader(items, batch_size=None, sampler=order, num_workers=workers, **options)


def _forking() -> context.BaseContext:
    """Forks, and tells its processes by a flag when they are to end."""

    class Forking(context.ForkContext):
        def Event(self) -> Any:  # noqa: N802
            return _Flag(self)

    return Forking()


class _Flag:
    """What PyTorch's loader asks of an Event, without a lock.

    Each worker looks at it all the time, and an Event's lock is never free again once one is killed while it looks:
    this process, which looks at it before it says that a worker has died, would wait for ever.
    """

    def __init__(self, of: context.BaseContext) -> None:
        self.raised = of.RawValue("b", 0)

    def set(self) -> None:
        self.raised.value = 1

    def is_set(self) -> bool:
        return bool(self.raised.value)
