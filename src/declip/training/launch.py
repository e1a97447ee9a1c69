"""`declip train --gpus N`: the same command N times on this machine, as torchrun starts it, and one answer for all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from declip.errors import RANK_LOST, RunStopped

GRACE = 15.0  # seconds that the others have to end by themselves, once one has failed
POLL = 0.1


def launch(arguments: Sequence[str], count: int) -> tuple[int, str]:
    """Run `declip ARGUMENTS` as `count` ranks; the exit code that answers for all, and what rank 0 printed.

    Ctrl-C and SIGTERM are passed on to every rank once. Raises RunStopped where a rank was killed from outside.
    """
    processes = _start(arguments, count)

    def forward(number: int, _: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        killed = _wait(processes)
        printed = processes[0].communicate()[0]
    finally:
        for process in processes:
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    return _answer([process.returncode for process in processes], killed), printed


def _start(arguments: Sequence[str], count: int) -> list[subprocess.Popen[str]]:
    threads = str(max(1, (os.cpu_count() or 1) // count))
    shared = {
        **{"OMP_NUM_THREADS": threads, **os.environ},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "DECLIP_LAUNCHED": "1"},
        **{"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "declip", *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
            text=True,
            start_new_session=True,  # the terminal's Ctrl-C reaches this process alone, which passes it on
        )
        for rank in range(count)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(processes: list[subprocess.Popen[str]]) -> set[int]:
    """Wait until all have ended; once one has failed the others get GRACE seconds. The ranks that had to be killed."""
    failed: float | None = None
    killed: set[int] = set()
    while any(process.poll() is None for process in processes):
        time.sleep(POLL)
        if failed is None and any(process.poll() for process in processes):
            failed = time.monotonic()
        if failed is not None and time.monotonic() - failed > GRACE:
            for rank, process in enumerate(processes):
                if process.poll() is None:
                    killed.add(rank)
                    process.kill()
    return killed


def _answer(codes: list[int], killed: set[int]) -> int:
    """The exit code of the rank that failed of itself; those that only lost it do not count."""
    own = {rank: code for rank, code in enumerate(codes) if code and code != RANK_LOST and rank not in killed}
    said = [code for code in own.values() if code > 0]
    for rank, code in own.items():
        if code < 0 and not said:
            name = signal.Signals(-code).name
            advice = ", mostly because memory ran out" if name == "SIGKILL" else ""
            raise RunStopped(
                f"Rank {rank} was ended by {name}{advice}, and the others with it. To go on from the last checkpoint: "
                "the same command with --resume."
            )
    return said[0] if said else int(any(codes))
