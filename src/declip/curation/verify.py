"""Whether a pack is as it was written."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from declip.curation.findings import counted
from declip.curation.pack import FORMAT, read_json
from declip.data.sources.index_files import index_facts
from declip.data.sources.opening import UNFINISHED
from declip.data.sources.tar_index import make_index
from declip.data.storage import Storage
from declip.errors import InputError
from declip.pairs import Data
from declip.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

_AT_ONCE = 4  # shards that are read at a time


def verify(folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Compare the shards of a pack with its manifest.

    Returns ``{"folder", "shards", "pairs", "missing", "changed", "additional", "whole"}``: names of shards, and whether
    there are none. Raises InputError where the folder holds no manifest, or its pack is not finished.
    """
    if (folder / UNFINISHED).exists():
        raise InputError(f"The pack in {folder} is not finished: run the same `declip data pack` again.")
    manifest = read_json(folder / "manifest.json")
    if not manifest or manifest.get("format") != FORMAT or not isinstance(manifest.get("shards"), list):
        raise InputError(f"{folder} holds no manifest.json: it was not written by `declip data pack`.")
    shards = manifest["shards"]
    missing: list[str] = []
    changed: list[str] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        digests = pool.map(lambda shard: _digest(folder / shard["file"]), shards)
        for done, (shard, digest) in enumerate(zip(shards, digests, strict=True), start=1):
            if digest != shard["sha256"]:
                (changed if digest else missing).append(shard["file"])
            elif not _index_fits(folder / shard["file"]):
                changed.append(f"{shard['file']}.index")
            if progress:
                progress("verifying shards", done, len(shards))
    there = {path.name for path in folder.glob("*.tar")}
    additional = sorted(there - {shard["file"] for shard in shards})
    return {
        "folder": str(folder),
        "shards": len(shards),
        "pairs": manifest["pairs"],
        "missing": missing,
        "changed": changed,
        "additional": additional,
        "whole": not (missing or changed or additional),
    }


def _index_fits(path: Path) -> bool:
    """Whether the index beside a shard is right; one of an older shard, or none, is made anew anyway."""
    index = Path(f"{path}.index")
    facts = index_facts(index)
    if facts is None or facts.get("shard") != Storage.of(Data()).version(str(path)):
        return True
    with pa.memory_map(str(index)) as mapped:
        return bool(pa.ipc.open_file(mapped).read_all().equals(make_index(str(path), path)[0]))


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def print_verified(result: dict[str, Any], console: Console) -> None:
    """What is wrong with a pack, shard by shard."""
    for name in ("missing", "changed", "additional"):
        for shard in result[name]:
            console.print(f"{name}: {shard}", style="bold red", highlight=False, markup=False)
    if result["whole"]:
        said = (
            f"{counted(result['shards'], 'shard')} with {counted(result['pairs'], 'pair')}: all as they were written."
        )
    else:
        said = "Delete the files that are changed or additional, and run the same `declip data pack` again."
    console.print(said, highlight=False, markup=False)
