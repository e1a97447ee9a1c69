"""Where the index of a file is kept, and what it says about itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from declip.errors import InputError, first_line
from declip.pairs import Data


def index_places(path: Path, data: Data) -> list[Path]:
    """Beside the file, or where that cannot be written, in the folder for indices."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "declip"
    folder = Path(data.index_folder).expanduser() if data.index_folder else cache
    digest = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=8).hexdigest()
    return [path.with_name(path.name + ".index"), folder / f"{path.name}.{digest}.index"]


def write_first(path: Path, places: Sequence[Path], write: Callable[[Path], None]) -> Path:
    """Write an index of `path` to the first place that can be written, by way of a temporary name.

    Raises InputError where there is none.
    """
    for place in places:
        temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")  # two processes may index at once
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
        except OSError as error:
            failed = error
            continue
        try:
            write(temporary)
            os.replace(temporary, place)
        except OSError as error:
            failed = error
        else:
            return place
        finally:
            temporary.unlink(missing_ok=True)
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
