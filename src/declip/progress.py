"""Progress of whatever takes its time, on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

Progress = Callable[[str, int, int], None]
"""What is done, how much of it, of how much."""


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr for each thing that is under way, as long as it is; a log file gets none."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    stderr = Console(stderr=True)
    bar = Bar(console=stderr, transient=True, disable=not stderr.is_terminal)
    tasks: dict[str, Any] = {}

    def progress(what: str, done: int, total: int) -> None:
        bar.start()  # not before there is something to show
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done)

    try:
        yield progress
    finally:
        if tasks:
            bar.stop()
