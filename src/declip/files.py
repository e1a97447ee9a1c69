"""Files that are whole or absent, and folders that are free."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from declip.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], object], several: bool = False) -> None:
    """Write to a temporary name beside `path`, then rename: a reader never sees half a file.

    several: processes may write the file at once, so each has a temporary name of its own.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if several else f".{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Tensors by name, as safetensors."""
    from safetensors.torch import save

    # Not save_file: what it raises on a full disk is no OSError.
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def check_unused(out: Path, advice: str = "give another --out") -> None:
    """Raise InputError where `out` is a file, or a folder with anything in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} already holds files: {advice}.")
