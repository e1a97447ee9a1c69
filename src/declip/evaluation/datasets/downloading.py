"""Fetching a benchmark, for those who ask for it: with torchvision's own downloader, else CLIP benchmark's shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from declip.errors import InputError, first_line
from declip.evaluation.datasets.catalogue import Benchmark, benchmark
from declip.evaluation.datasets.layouts import Found, find

# torchvision's class of each, and what it is called with; each fetches all splits at once.
_TORCHVISION: dict[str, tuple[str, dict[str, Any]]] = {
    "pets": ("OxfordIIITPet", {"split": "test"}),
    "cifar10": ("CIFAR10", {}),
    "cifar100": ("CIFAR100", {}),
    "food101": ("Food101", {"split": "test"}),
    "flowers": ("Flowers102", {"split": "test"}),
    "caltech101": ("Caltech101", {}),
    "aircraft": ("FGVCAircraft", {"split": "test"}),
    "dtd": ("DTD", {"split": "test"}),
}


def download(name: str, root: str | Path) -> Found:
    """Fetch a benchmark into a folder, unless it is there.

    Raises InputError where it cannot be fetched, which says where to get it.
    """
    known = benchmark(name)
    folder = Path(root).expanduser()
    if there := find(known.name, folder):
        return there
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if known.name in _TORCHVISION:
            _with_torchvision(known, folder)
        else:
            _shards(known, folder)
    # What goes wrong on the way is the network's, the server's, the disk's or an archive's, and every library has
    # exceptions of its own for it.
    except Exception as error:
        raise InputError(
            f"{known.title} could not be downloaded to {folder} ({first_line(error)}): get it from {known.source}; it "
            f"needs {known.needs}."
        ) from error
    found = find(known.name, folder)
    if found is None:
        raise InputError(f"{known.title} was downloaded to {folder}, but {known.needs} is not there: look what came.")
    return found


def _with_torchvision(known: Benchmark, folder: Path) -> None:
    from torchvision import datasets

    kind, options = _TORCHVISION[known.name]
    getattr(datasets, kind)(str(folder), download=True, **options)


def _shards(known: Benchmark, folder: Path) -> None:
    """CLIP benchmark's copy on the Hugging Face hub."""
    from huggingface_hub import snapshot_download

    snapshot_download(f"clip-benchmark/{known.hub}", repo_type="dataset", local_dir=folder / known.hub)
