"""Loader processes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch.utils.data import DataLoader, Dataset

from declip.memory import give_back_freed_memory


def read_ahead(items: Dataset[Any], order: Iterable[Any], workers: int, **options: Any) -> DataLoader[Any]:
    """`items` in that order, each as it is, made by `workers` processes ahead of time; 0: by this one.

    On Linux they are forked: nothing is copied or imported anew. options: DataLoader's own
    """
    if workers:
        give_back_freed_memory()
        options["multiprocessing_context"] = "fork" if sys.platform == "linux" else None
    return DataLoader(items, batch_size=None, sampler=order, num_workers=workers, **options)
