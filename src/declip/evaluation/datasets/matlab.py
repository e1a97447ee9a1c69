"""MATLAB's files of version 5, in which Flowers-102 and Stanford Cars keep their labels: arrays, texts, structs.

The format is MathWorks' "MAT-File Format". Only what these sets need is read, and nothing in a file is run.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from declip.errors import InputError, first_line

_HEADER = 128  # bytes
_LARGEST = 2**28  # unpacked bytes of a variable: the sets' own have a few megabytes
_DEEPEST = 8  # arrays in arrays
_MATRIX, _COMPRESSED, _UTF8, _UTF16 = 14, 15, 16, 17
_CELL, _STRUCT, _CHAR = 1, 2, 4
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}


def read_matlab(path: Path) -> dict[str, Any]:
    """The variables of a file by name: numbers as flat arrays, texts as str, cells as lists, structs as lists of dicts.

    Raises InputError where the file cannot be read or is of another version.
    """
    try:
        data = path.read_bytes()
        if len(data) < _HEADER or data[126:128] not in (b"IM", b"MI"):
            raise ValueError("it is no MATLAB file of version 5")
        return dict(_Reader(data, "<" if data[126:128] == b"IM" else ">").variables())
    except (OSError, ValueError, LookupError, struct.error, zlib.error) as error:
        raise InputError(f"{path} cannot be read as a MATLAB file: {first_line(error)}; get it anew.") from None


class _Element(NamedTuple):
    kind: int
    data: bytes
    end: int  # where the next one begins


class _Reader:
    def __init__(self, data: bytes, order: str) -> None:
        self.data, self.order = data, order

    def variables(self) -> list[tuple[str, Any]]:
        found = []
        at = _HEADER
        while at + 8 <= len(self.data):
            kind, data, at = self._element(self.data, at)
            if kind == _COMPRESSED:
                unpacker = zlib.decompressobj()
                inner = unpacker.decompress(data, _LARGEST)
                if unpacker.unconsumed_tail:
                    raise ValueError("a variable in it is too large")
                kind, data, _ = self._element(inner, 0)
            if kind == _MATRIX:
                found.append(self._matrix(data))
        return found

    def _element(self, data: bytes, at: int) -> _Element:
        """The element that begins at a byte; it is followed by padding to eight bytes, unless it is compressed."""
        kind, size = struct.unpack_from(f"{self.order}II", data, at)
        if kind >> 16:  # a small one: its size and data are in the tag
            return _Element(kind & 0xFFFF, data[at + 4 : at + 4 + min(kind >> 16, 4)], at + 8)
        if at + 8 + size > len(data):
            raise ValueError("it is cut off")
        padded = size if kind == _COMPRESSED else -(-size // 8) * 8
        return _Element(kind, data[at + 8 : at + 8 + size], at + 8 + padded)

    def _matrix(self, data: bytes, depth: int = 0) -> tuple[str, Any]:
        """An array's name and content."""
        if depth > _DEEPEST:
            raise ValueError("its arrays are nested too deep")
        if not data:
            return "", np.empty(0)
        _, flags, at = self._element(data, 0)
        _, dimensions, at = self._element(data, at)
        _, name, at = self._element(data, at)
        shape = np.frombuffer(dimensions, f"{self.order}i4")
        count = int(np.prod(shape, dtype=np.int64))
        if not 0 <= count <= _LARGEST:
            raise ValueError(f"it has an array of {count} elements")
        kind = struct.unpack(f"{self.order}I", flags[:4])[0] & 0xFF
        said = name.decode("ascii", "replace")
        if kind == _STRUCT:
            return said, self._structs(data, at, count, depth)
        if kind == _CELL:
            return said, [value for _, value in self._matrices(data, at, count, depth)]
        stored, values, _ = self._element(data, at)
        if kind == _CHAR:
            return said, self._text(stored, values)
        return said, np.frombuffer(values, self.order + _TYPES[stored])

    def _structs(self, data: bytes, at: int, count: int, depth: int) -> list[dict[str, Any]]:
        _, length, at = self._element(data, at)
        _, names, at = self._element(data, at)
        width = struct.unpack(f"{self.order}i", length)[0]
        if width < 1:
            raise ValueError("it has a struct without names")
        fields = [
            names[start : start + width].split(b"\0")[0].decode("ascii", "replace")
            for start in range(0, len(names), width)
        ]
        values = [value for _, value in self._matrices(data, at, count * len(fields), depth)]
        return [
            dict(zip(fields, values[start : start + len(fields)], strict=True))
            for start in range(0, count * len(fields), max(1, len(fields)))
        ]

    def _matrices(self, data: bytes, at: int, count: int, depth: int) -> list[tuple[str, Any]]:
        found = []
        for _ in range(count):
            kind, inner, at = self._element(data, at)
            if kind != _MATRIX:
                raise ValueError(f"an element of kind {kind} stands where an array should")
            found.append(self._matrix(inner, depth + 1))
        return found

    def _text(self, stored: int, values: bytes) -> str:
        if stored in (4, _UTF16):
            return values.decode("utf-16-le" if self.order == "<" else "utf-16-be")
        return values.decode("utf-8" if stored == _UTF8 else "latin-1")
