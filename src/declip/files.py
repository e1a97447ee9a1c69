"""Files that are whole or absent, and folders that are free."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from declip.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], object], several: bool = False, durable: bool = False) -> None:
    """Write to a temporary name beside `path`, then rename: a reader never sees half a file.

    several: processes may write the file at once, so each has a temporary name of its own
    durable: the same holds when the power fails; this waits for the disk
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if several else f".{path.name}.tmp")
    try:
        write(temporary)
        if durable:
            flush_to_disk(temporary)
        os.replace(temporary, path)
        if durable and os.name == "posix":  # elsewhere a folder cannot be opened
            flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until what was written to a file, or the names in a folder, would outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_weights(path: Path, weights: dict[str, Tensor], durable: bool = False) -> None:
    """Tensors by name, as safetensors."""
    from safetensors.torch import save

    # Not save_file: what it raises on a full disk is no OSError.
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
    write_atomically(path, lambda temporary: temporary.write_bytes(data), durable=durable)


def check_unused(out: Path, advice: str = "give another --out") -> None:
    """Raise InputError where `out` is a file, or a folder with anything in it.

    A temporary file that a killed process left is nothing.
    """
    if out.exists() and (not out.is_dir() or any(not _is_temporary(path) for path in out.iterdir())):
        raise InputError(f"{out} already holds files: {advice}.")


def remove_temporary(folder: Path) -> None:
    """Remove what processes that were killed in the middle of `write_atomically` left."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".tmp"
