"""An index of a tar shard: where each pair's members lie, found in one pass over the headers and kept in a file."""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from declip.data.sources.index_files import write_index
from declip.errors import InputError, first_line

IMAGES = frozenset(["jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"])
CAPTIONS = frozenset(["txt", "text", "caption"])
FORMAT = 1
_BLOCK = 512
_SHOWN = 3  # names in a message
_PAX = re.compile(rb"(\d{1,19}) ([^=]+)=")
_SIZE = re.compile(r"[0-9]{1,19}")

# What a pair's members are; of each kind the index has where it begins (-1: there is none) and its size in bytes.
ROLES = ("image", "text", "json", "label")
SCHEMA = pa.schema(
    [pa.field("key", pa.string())]
    + [pa.field(f"{role}_{what}", pa.int64()) for role in ROLES for what in ("at", "size")]
)


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    at: int
    size: int


_ABSENT = Member("", -1, -1)


class Problems:
    """What is wrong with a shard, counted, with the first names."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}
        self.counts: dict[str, int] = {}

    def add(self, kind: str, name: str) -> None:
        """Note a problem with a member, or with the whole shard."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        shown = self.found.setdefault(kind, [])
        if len(shown) < _SHOWN:
            shown.append(name)

    def sentences(self) -> list[str]:
        """One a kind: ``2 unsafe paths that were left out: ../a.jpg, /b.jpg``."""
        return [f"{count:,} {kind}: {', '.join(self.found[kind])}" for kind, count in self.counts.items()]


def read_members(data: mmap.mmap | bytes, problems: Problems) -> Iterator[Member]:
    """The regular files of a tar in the ustar, GNU or pax format, in their order; their bytes are not read.

    A tar that is cut is read up to the cut, and a damaged header ends it; `problems` says so.
    """
    offset, end, long_name = 0, len(data), None
    pax: dict[str, str] = {}
    while offset + _BLOCK <= end:
        header = data[offset : offset + _BLOCK]
        if not header[0] and not header.strip(b"\0"):
            return
        try:
            size, kind = _number(header[124:136]), header[156:157]
            fits = _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * 32
        except ValueError:
            fits, size, kind = False, 0, b""
        if not fits:
            problems.add("damaged headers, after which nothing was read", f"at byte {offset}")
            return
        at = offset + _BLOCK
        if "size" in pax and kind not in b"xgL":
            size = int(pax["size"])
        if at + size > end:
            problems.add("members cut off at the end of the file", _name(header, long_name, pax))
            return
        offset = at + -(-size // _BLOCK) * _BLOCK
        if kind == b"L":
            long_name = data[at : at + size].rstrip(b"\0")
        elif kind == b"x":
            pax = _pax(data[at : at + size])
        elif kind != b"g":
            if kind in (b"0", b"\0", b"7"):
                yield Member(_name(header, long_name, pax), at, size)
            long_name, pax = None, {}
    problems.add("missing end marks: the file may be cut", f"at byte {offset}")


def _number(field: bytes) -> int:
    """A number field: octal digits, or GNU's base 256."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit():  # int() would take a sign, and a negative size would lead back to this header for ever
        raise ValueError(f"{digits!r} is no octal number")
    return int(digits, 8)


def _name(header: bytes, long_name: bytes | None, pax: dict[str, str]) -> str:
    if "path" in pax:
        return pax["path"]
    name = header[:100].split(b"\0", 1)[0] if long_name is None else long_name
    if long_name is None and header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "replace")


def _pax(data: bytes) -> dict[str, str]:
    """The records ``length key=value`` of a pax header that say path and size."""
    found, at = {}, 0
    while match := _PAX.match(data, at):
        end = at + int(match[1])
        if end <= match.end():  # a record that ends before its value
            break
        name, value = match[2], data[match.end() : end - 1].decode("utf-8", "replace")
        if name == b"path" or (name == b"size" and _SIZE.fullmatch(value)):
            found[name.decode()] = value
        at = end
    return found


def make_index(path: str, file: Path) -> tuple[pa.Table, list[str]]:
    """Index a shard: a row a pair as in SCHEMA, and what is wrong with it.

    path: what messages call it; file: the shard, or a copy of it.
    Members belong together when they follow one another and are named alike up to the first dot of the base name, as
    in webdataset. Raises InputError where the file cannot be read or is compressed.
    """
    problems = Problems()
    columns: dict[str, list[str | int]] = {name: [] for name in SCHEMA.names}
    try:
        with file.open("rb") as opened:
            if not os.fstat(opened.fileno()).st_size:
                raise InputError(f"{path} is an empty file, no tar shard.")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                if data[:2] == b"\x1f\x8b" or data[:4] == b"\x28\xb5\x2f\xfd":
                    raise InputError(f"{path} is compressed, and cannot be read at random: unpack it to a plain tar.")
                for key, group in groupby(_named(data, problems), key=itemgetter(0)):
                    members = list(group)
                    roles = {role: member for _, extension, member in members if (role := _role(extension))}
                    if not roles:
                        problems.add("names without a member of a known kind", members[0][2].name)
                        continue
                    columns["key"].append(key)
                    for role in ROLES:
                        _, at, size = roles.get(role, _ABSENT)
                        columns[f"{role}_at"].append(at)
                        columns[f"{role}_size"].append(size)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}.") from None
    table = pa.table(columns, schema=SCHEMA)
    _note_partners(table, problems)
    return table, problems.sentences()


def _named(data: mmap.mmap, problems: Problems) -> Iterator[tuple[str, str, Member]]:
    """The members that belong to a pair: its key, the extension, and the member."""
    for member in read_members(data, problems):
        if named := _split(member.name, problems):
            yield *named, member


def _split(name: str, problems: Problems) -> tuple[str, str] | None:
    """A member's key and extension; None for one that has none, is hidden, or climbs out of the shard."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        problems.add("unsafe paths that were left out", name)
        return None
    base, dot, extension = parts[-1].partition(".")
    if not (base and dot):
        return None
    return "/".join([*parts[:-1], base]), extension.lower()


def _role(extension: str) -> str | None:
    if extension in IMAGES:
        return "image"
    if extension in CAPTIONS:
        return "text"
    return {"json": "json", "cls": "label"}.get(extension)


def _note_partners(table: pa.Table, problems: Problems) -> None:
    keys = table["key"]
    missing = np.asarray(table["image_at"]) < 0
    for index in np.flatnonzero(missing).tolist():
        problems.add("captions without an image", keys[index].as_py())
    wordless = ~missing & np.all([np.asarray(table[f"{role}_at"]) < 0 for role in ("text", "json", "label")], axis=0)
    for index in np.flatnonzero(wordless).tolist():
        problems.add("images without a caption", keys[index].as_py())


def write_tar_index(path: str, file: Path, version: str, places: Sequence[Path]) -> Path:
    """Index a shard into a file, in the first place that can be written: returns where.

    file: the shard, or a copy of it; version: what changes when the shard changes.
    """
    return write_index(path, places, index_writer(path, file, version))


def index_writer(path: str, file: Path, version: str) -> Callable[[Path], None]:
    """Index a shard: returns what writes the index into a file. The arguments are those of ``write_tar_index``."""
    table, problems = make_index(path, file)
    facts = {"format": FORMAT, "shard": version, "pairs": len(table), "problems": problems}
    schema = SCHEMA.with_metadata({"declip": json.dumps(facts)})

    def write(temporary: Path) -> None:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_table(table.combine_chunks())

    return write
