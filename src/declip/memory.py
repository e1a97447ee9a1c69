"""Memory of a process on a CPU: what a step frees, the next one takes; processes that it forks get none of it."""

from __future__ import annotations

import ctypes
import os
import platform

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt's names for its options, in malloc.h
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


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
