"""Work dealt out to processes, its results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import connection
from typing import Any, TypeVar

from declip.errors import RunStopped

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Item], Result]

_AHEAD = 4  # items a process: what waits is bounded
_TICK = 0.5  # seconds


def in_processes(
    make: Callable[..., Work[Item, Result]],
    given: tuple[Any, ...],
    items: Sequence[Item],
    workers: int,
    *,
    died: str,
    tick: Callable[[], None] | None = None,
    stop: Callable[[], None] | None = None,
) -> Iterator[Result]:
    """What ``make(*given)`` returns for each item, in order, in `workers` processes (0, or one item: in this one).

    Each process calls ``make`` once. died: what RunStopped says when one of them was killed; tick: called every half a
    second that is waited; stop: tells work that is under way to end, as nobody wants its result any more.
    """
    if workers == 0 or len(items) <= 1:
        work = make(*given)
        for item in items:
            yield work(item)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(min(workers, len(items)), context, _begin, (make, given))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_do, item))
            if len(waiting) > _AHEAD * workers:
                yield _result(waiting.popleft(), tick)
        while waiting:
            yield _result(waiting.popleft(), tick)
    except BrokenProcessPool:
        raise RunStopped(died) from None
    finally:
        if stop:
            stop()
        pool.shutdown(cancel_futures=True)


def _result(future: Future[Result], tick: Callable[[], None] | None) -> Result:
    while tick and not wait([future], _TICK).done:
        tick()
    return future.result()


_work: Work[Any, Any] | None = None  # of a worker process


def _begin(make: Callable[..., Work[Any, Any]], given: tuple[Any, ...]) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = make(*given)


def _end_with_parent() -> None:
    """A main process that is killed leaves nobody behind who still writes."""
    if parent := multiprocessing.parent_process():
        with suppress(OSError):
            connection.wait([parent.sentinel])
        os._exit(1)


def _do(item: Any) -> Any:
    if _work is None:
        raise RuntimeError("the worker process was not set up")
    return _work(item)
