"""CIFAR-10 and CIFAR-100 as their Python archives unpack: pickles of pixels (Krizhevsky 2009)."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from declip.data.sources.base import Pair, one_shard, position
from declip.errors import InputError, first_line
from declip.evaluation.datasets.catalogue import Benchmark
from declip.evaluation.datasets.labelled import Read, spoken

# What the archives' pickles need to rebuild arrays, by the names of old and new releases of numpy; a pickle that
# asks for anything else is refused, as it could run any program.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
_SIDE = 32

_FILES = {
    ("cifar10", "train"): [f"data_batch_{number}" for number in range(1, 6)],
    ("cifar10", "test"): ["test_batch"],
    ("cifar100", "train"): ["train"],
    ("cifar100", "test"): ["test"],
}
_NAMES = {"cifar10": ("batches.meta", "label_names", "labels"), "cifar100": ("meta", "fine_label_names", "fine_labels")}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which such a file has no need of")
        return super().find_class(module, name)


@dataclass(frozen=True, slots=True, eq=False)
class PixelSource:
    """Images that are held as pixels, ``[images, height, width, 3]``, and handed out as PNG files."""

    name: str
    pixels: NDArray[np.uint8]
    names: tuple[str, ...]
    numbers: NDArray[np.int64]

    @property
    def named(self) -> bool:
        return False

    @property
    def shards(self) -> NDArray[np.int64]:
        return one_shard(len(self))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int, /) -> Pair:
        i = position(i, len(self))
        buffer = io.BytesIO()
        Image.fromarray(self.pixels[i]).save(buffer, "PNG", compress_level=1)
        return Pair(self.key(i), buffer.getvalue(), (), self.label(i), self.where(i))

    def captions(self, i: int, /) -> tuple[str, ...]:
        position(i, len(self))
        return ()

    def key(self, i: int, /) -> str:
        return str(position(i, len(self)))

    def label(self, i: int, /) -> str | None:
        number = int(self.numbers[position(i, len(self))])
        return self.names[number] if 0 <= number < len(self.names) else None

    def where(self, i: int, /) -> str:
        return f"{self.name}, image {position(i, len(self))}"


def read_cifar(known: Benchmark, folder: Path, split: str) -> Read:
    """A split of CIFAR-10 or -100. Raises InputError where a file is missing or is not what it should be."""
    meta, names_key, labels_key = _NAMES[known.name]
    names = _field(folder / meta, _unpickled(folder / meta), names_key, list)
    classes = tuple(_text(name) for name in names)
    pixels, labels = [], []
    for file in (folder / name for name in _FILES[known.name, split]):
        batch = _unpickled(file)
        data = _field(file, batch, "data", np.ndarray)
        numbers = _field(file, batch, labels_key, list)
        if data.dtype != np.uint8 or data.shape != (len(numbers), 3 * _SIDE * _SIDE):
            raise InputError(f"{file} holds no {_SIDE}×{_SIDE} images with a label each: get it anew.")
        pixels.append(data.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1))
        labels += numbers
    try:
        of_class = np.array(labels, np.int64).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{folder}: the labels of its {split} split are no numbers: get the archive anew.") from None
    source = PixelSource(f"{folder}, {split} split", np.concatenate(pixels), classes, of_class)
    return Read(source, of_class, spoken(classes))


def _unpickled(file: Path) -> dict[str, Any]:
    """The dictionary in a file, with its keys as text: Python 2 wrote them as bytes, or as text."""
    try:
        with file.open("rb") as opened:
            values = _Restricted(opened, encoding="bytes").load()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {first_line(error)}; unpack the archive anew.") from None
    # What a damaged pickle raises is anything: the sentence says which file it was.
    except (pickle.UnpicklingError, EOFError, MemoryError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file} cannot be read as a file of CIFAR: {first_line(error)}; get it anew.") from None
    if not isinstance(values, dict):
        raise InputError(f"{file} cannot be read as a file of CIFAR: it holds no dictionary; get it anew.")
    return {_text(key): value for key, value in values.items()}


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _field(file: Path, values: dict[str, Any], name: str, kind: type) -> Any:
    if not isinstance(values.get(name), kind):
        raise InputError(f"{file} cannot be read as a file of CIFAR: it has no {name}; get it anew.")
    return values[name]
