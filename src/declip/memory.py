"""Memory of a process on a CPU: what a step frees, the next one takes; processes that it forks get none of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from pathlib import Path

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt's names for its options, in malloc.h
GB = 2**30
_GROUPS = Path("/sys/fs/cgroup")
_OF_GROUP = (  # the limit, what is used, and of what; of the kernel's second version, and of its first
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
_LARGEST = 2**31 - 1
_SAID = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed, for the whole process; returns whether it does so.

    glibc gives large blocks back to the system as soon as they are freed, and every activation of the next step is then
    paged in anew, 4 kB at a time, which takes longer than computing it: benchmarks/allocator.py. PyTorch's allocators
    on GPUs keep what is freed too; on a CPU it has none of its own. The process holds about a third more memory.
    Nothing is done where the environment says how malloc shall behave, or the C library is another one.
    """
    if not _is_glibc() or any(name in os.environ for name in _SAID):
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(option, _LARGEST) for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))


def give_back_freed_memory() -> None:
    """Give back to the system what is freed, once; to be called before loader processes are forked.

    They would share it at first, and keep a copy of each page that this process writes to afterwards: twice the memory.
    """
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def free_bytes() -> int | None:
    """What the machine and the process's control group still have; None where that is not known, as outside Linux."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    for limit, used, files in _OF_GROUP:
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
            taken = int((_GROUPS / used).read_text()) - _given_up(_GROUPS / files)
            free = min(free, int((_GROUPS / limit).read_text()) - taken)
    return free


def _given_up(path: Path) -> int:
    """Bytes of files in a group's memory, which makes room when it is asked for more."""
    lines = (line.split() for line in path.read_text().splitlines())
    return next(int(size) for name, size in lines if name in {"inactive_file", "total_inactive_file"})


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
