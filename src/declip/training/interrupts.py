"""Signals that wait for the end of the training step, so that what is saved resumes exactly."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from declip.errors import Preempted
from declip.training.distributed import News

GRACE_SECONDS = 15.0  # clusters kill 30 s after SIGTERM; the other half is for writing the checkpoint


class Interrupts:
    """What was asked for: `stop` by Ctrl-C, `preempted` by SIGTERM; `late` where that came in the middle of a step."""

    def __init__(self) -> None:
        self.stop = self.preempted = self.late = False

    def check(self, agreed: News | None = None) -> None:
        """Between two steps: raise KeyboardInterrupt after Ctrl-C, Preempted after SIGTERM.

        agreed: what several ranks have agreed on, instead of what this one was asked for
        """
        asked = agreed or self
        if asked.preempted:
            raise Preempted
        if asked.stop:
            raise KeyboardInterrupt

    def settle(self) -> None:
        """Where no step is under way any more, there is nothing to be late for."""
        _alarm_in(0.0)

    def press(self, *_: object) -> None:
        if self.stop:
            self.late = True
            raise KeyboardInterrupt
        self.stop = True

    def terminate(self, *_: object) -> None:
        if not self.preempted:
            self.preempted = True
            _alarm_in(GRACE_SECONDS)

    def run_out(self, *_: object) -> None:
        self.late = True
        raise Preempted


@contextlib.contextmanager
def interrupts_between_steps() -> Iterator[Interrupts]:
    """Ctrl-C and SIGTERM wait for `check`; a second Ctrl-C does not wait, nor does SIGTERM after GRACE_SECONDS.

    Where Python allows no handlers, outside the main thread, nothing changes.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    handlers = {signal.SIGINT: interrupts.press, signal.SIGTERM: interrupts.terminate}
    if hasattr(signal, "SIGALRM"):
        handlers[signal.SIGALRM] = interrupts.run_out
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield interrupts
    finally:
        _alarm_in(0.0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _alarm_in(seconds: float) -> None:
    """0 takes the alarm back. Windows has none."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)
