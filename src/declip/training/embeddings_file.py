"""A teacher that is a file: embeddings of the pairs that somebody has computed, as .npz or .safetensors."""

from __future__ import annotations

import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from declip.data.sources import Source, whole_of
from declip.errors import InputError, first_line
from declip.model.export import read_weights
from declip.model.parts import Part

ENDINGS = (".npz", ".safetensors")
_NAMES: dict[Part, str] = {"image": "images", "text": "texts"}


class EmbeddingsFile:
    """`images` [pairs, width] and, if it has them, `texts` [captions, width], those of a pair one after the other.

    The pairs are those of data.train, with or without what is held out; where `keys` [pairs] says whose each row is,
    the order is free.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError where it cannot be read, or lacks images."""
        self.path, self.arrays = path, _read(path)
        if "images" not in self.arrays:
            raise InputError(f"{path} has no images: it needs a matrix of that name, a row a pair, and may have texts.")
        self.parts: tuple[Part, ...] = tuple(part for part, name in _NAMES.items() if name in self.arrays)
        for part in self.parts:
            array = self.arrays[_NAMES[part]]
            if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
                raise InputError(f"{path}: {part}s is no matrix of floating-point numbers, a row for each.")
        widths = {self.arrays[_NAMES[part]].shape[1] for part in self.parts}
        if len(widths) > 1:
            raise InputError(f"{path}: images and texts are of different widths, so they share no space.")
        self.width: int = widths.pop()

    @property
    def version(self) -> tuple[str, ...]:
        """What changes when the file changes."""
        facts = self.path.stat()
        return str(self.path.resolve()), str(facts.st_size), str(facts.st_mtime_ns)

    def of(self, source: Source, part: Part) -> NDArray[np.float32]:
        """The embeddings of the pairs, or of their captions, in their order; raises InputError where rows lack."""
        rows = self._rows(source)[part]
        found: NDArray[np.float32] = self.arrays[_NAMES[part]][rows].astype(np.float32)
        return found

    def _rows(self, pairs: Source) -> dict[Part, NDArray[np.int64]]:
        """Which row of `images` each pair has, and which row of `texts` each of their captions."""
        count = len(self.arrays["images"])
        whole, places = whole_of(pairs)
        if "keys" in self.arrays:
            order = self._order_of(self.arrays["keys"], whole)
        else:
            if count not in (len(whole), len(pairs)):
                trained = "" if len(whole) == len(pairs) else f", {len(pairs):,} of them to train on"
                raise InputError(
                    f"{self.path} has images for {count:,} pairs, but {pairs.name} has {len(whole):,}{trained}."
                )
            if count != len(whole):
                whole, places = pairs, np.arange(count)
            order = np.arange(count)
        row_of = np.full(len(whole), -1)
        row_of[order] = np.arange(count)
        rows = row_of[places]
        if (rows < 0).any():
            missing = pairs.key(int(np.flatnonzero(rows < 0)[0]))
            raise InputError(f"{self.path} has no embedding of the pair {missing!r} of {pairs.name}.")
        found: dict[Part, NDArray[np.int64]] = {"image": rows}
        if "texts" in self.arrays:
            counts = np.array([len(whole.captions(int(pair))) for pair in order])
            ends, texts = np.cumsum(counts), len(self.arrays["texts"])
            if ends[-1] != texts:
                raise InputError(f"{self.path} has texts for {texts:,} captions, but these pairs have {ends[-1]:,}.")
            found["text"] = np.concatenate([np.arange(ends[row] - counts[row], ends[row]) for row in rows])
        return found

    def _order_of(self, keys: np.ndarray, whole: Source) -> NDArray[np.int64]:
        """Which pair each row is of."""
        count = len(self.arrays["images"])
        if keys.ndim != 1 or keys.dtype.kind not in "US" or len(keys) != count:
            raise InputError(f"{self.path}: keys must be {count:,} strings, one for each row of images.")
        named = [key.decode("utf-8", "replace") if isinstance(key, bytes) else key for key in keys.tolist()]
        known = [whole.key(index) for index in range(len(whole))]
        places = {key: index for index, key in enumerate(known)}
        for names in (known, named):
            if len(set(names)) < len(names):
                doubled = next(key for key, times in Counter(names).items() if times > 1)
                raise InputError(f"{self.path}: keys cannot say whose row is whose, several are {doubled!r}.")
        if odd := next((key for key in named if key not in places), None):
            raise InputError(f"{self.path}: keys has {odd!r}, which is no pair of {whole.name}.")
        return np.array([places[key] for key in named])


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name; nothing in it is unpickled."""
    if path.suffix == ".safetensors":
        tensors = read_weights(path)
        return {name: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for name, t in tensors.items()}
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array without a name")
        with file:
            return {name: file[name] for name in (*_NAMES.values(), "keys") if name in file}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}.") from None
