"""The index of a file: written where there is room for it, and what it says about itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from declip.errors import InputError, first_line
from declip.files import write_atomically


def write_index(path: str, places: Sequence[Path], write: Callable[[Path], object]) -> Path:
    """Write an index of `path` to the first place that can be written: returns where.

    Raises InputError where there is none.
    """
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, write, several=True)
        except OSError as error:
            failed = error
        else:
            return place
    raise InputError(
        f"The index of {path} can be written nowhere ({first_line(failed)}): say data.index_folder=FOLDER."
    ) from None


def index_facts(index: Path) -> dict[str, Any] | None:
    """What an index says about itself; None where there is none, or no whole one."""
    try:
        with pa.memory_map(str(index)) as file:
            facts = json.loads((pa.ipc.open_file(file).schema.metadata or {})[b"declip"])
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None
    return facts if isinstance(facts, dict) else None
