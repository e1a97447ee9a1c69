"""A new set of pairs without copies, and without what is in a test set."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from declip.curation.copies import Copies, common, find_copies
from declip.curation.duplicates import Pairs
from declip.curation.fingerprints import fingerprint
from declip.curation.scan import Scan, scan
from declip.curation.shard import valid
from declip.data.sources import BrokenPair, Pair, Source, open_sources
from declip.errors import InputError
from declip.files import check_unused, write_atomically
from declip.pairs import Data
from declip.progress import Progress

ROWS = 1000
"""Pairs of a row group."""
FILE_BYTES = 2**28
"""Encoded images of a file, about."""

_COLUMNS: dict[str, pa.DataType] = {
    "key": pa.string(),
    "image": pa.binary(),
    "captions": pa.list_(pa.string()),
    "label": pa.string(),
}
_SCHEMA = pa.schema(_COLUMNS)


@dataclass(frozen=True, slots=True)
class Removal:
    """Why a pair is left out, and the pair that it equals: an index in the set, or in the test set, or none (-1)."""

    reason: str
    equals: int = -1
    in_test: bool = False


def dedup(
    specs: Sequence[str],
    out: Path,
    data: Data,
    *,
    test: Sequence[str] = (),
    near: bool = True,
    equal_keys: bool = False,
    merge_captions: bool = True,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the pairs that are left to ``out/part-00000.parquet``, …, in storage order.

    Of each group of equal images one pair is kept, the largest, of equally large ones the first; with near=True also
    of near-duplicates: whoever is left out equals a pair that is kept. Left out are also pairs with an image of the
    test set, with equal_keys those with a key of it, and broken ones. With merge_captions the kept pair gets the
    captions of its exact copies. ``out/log/removed.jsonl`` names every pair left out: place, key, reason, and the place
    of the pair that it equals.

    Returns ``{"data", "test", "out", "pairs", "kept", "removed": {reason: count}, "files"}``. Raises InputError where
    a source cannot be read, `out` holds files, or nothing would be left.
    """
    with _written_whole(out) as folder:
        source = open_sources(specs, data, need_captions=False)
        other = open_sources(test, data, need_captions=False) if test else None
        seen = scan(source, workers, progress, "reading pairs")
        seen_test = scan(other, workers, progress, "reading the test set") if other is not None else None
        copies = find_copies(seen, seen_test, near)
        removed = _removals(seen, copies, seen_test, equal_keys)
        if len(removed) == len(source):
            raise InputError(f"Nothing of {source.name} would be left: every pair is broken or in the test set.")
        merged = _merged(removed) if merge_captions else {}
        (folder / "log").mkdir()
        kept = [index for index in range(len(source)) if index not in removed]
        files = _write_pairs(folder, source, kept, merged, progress)
        # In a folder of its own: beside the parquet files it would be taken for a caption table.
        _write_removed(folder / "log" / "removed.jsonl", source, other, removed)
        reasons = [removal.reason for removal in removed.values()]
    return {
        "data": [str(spec) for spec in specs],
        "test": [str(spec) for spec in test],
        "out": str(out),
        "pairs": len(source),
        "kept": len(kept),
        "removed": {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)},
        "files": files,
    }


@contextmanager
def _written_whole(out: Path) -> Iterator[Path]:
    """A folder that takes the place of `out` once all is written; what is left of a killed process is deleted."""
    check_unused(out, "give another --out")
    folder = out.with_name(f".{out.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _removals(seen: Scan, copies: Copies, test: Scan | None, equal_keys: bool) -> dict[int, Removal]:
    """What is left out, by index, in storage order."""
    removed = {int(index): Removal("broken") for index in np.flatnonzero(seen.pairs["broken"])}
    if test is not None and equal_keys:
        keyed, test_keyed = (np.flatnonzero(part.pairs["key_hash"] != 0) for part in (seen, test))
        for index, equal in common(seen.pairs["key_hash"], keyed, test.pairs["key_hash"], test_keyed).tolist():
            removed.setdefault(index, Removal("key in the test set", equal, True))
    for reason, pairs in (("image in the test set", copies.test_exact), ("near the test set", copies.test_near)):
        for index, equal in pairs.tolist():
            removed.setdefault(index, Removal(reason, equal, True))
    best = _best(seen, copies, removed)
    for index, equal in best.items():
        if index != equal:
            removed[index] = Removal("equal image", equal)
    for index, equal in _thinned(seen, copies, best).items():
        removed[index] = Removal("near-duplicate", equal)
    # A copy of a pair that goes as a near-duplicate equals the one that stays, nearly.
    for index, removal in list(removed.items()):
        if removal.reason == "equal image" and removal.equals in removed:
            removed[index] = Removal("near-duplicate", removed[removal.equals].equals)
    return dict(sorted(removed.items()))


def _area(seen: Scan, index: int) -> int:
    return int(seen.pairs[index]["width"]) * int(seen.pairs[index]["height"])


def _best(seen: Scan, copies: Copies, removed: dict[int, Removal]) -> dict[int, int]:
    """Each pair that is still there, and the one of its exact copies that stays: the first."""
    stays: dict[int, int] = {}
    best: dict[int, int] = {}
    for index in seen.whole.tolist():  # exact copies are equally large
        if index not in removed:
            best[index] = stays.setdefault(int(copies.first[index]), index)
    return best


def _thinned(seen: Scan, copies: Copies, best: dict[int, int]) -> dict[int, int]:
    """Of what is nearly equal, the smaller, and the kept pair that each equals.

    From the largest down, a pair goes where it equals one that stays. So no chain of small changes takes away a picture
    that equals no kept one.
    """
    stays = {int(copies.first[index]): index for index in best.values()}
    near: dict[int, list[int]] = {}
    for one, other in _among(copies.near, stays):
        near.setdefault(stays[one], []).append(stays[other])
        near.setdefault(stays[other], []).append(stays[one])
    gone: dict[int, int] = {}
    kept: set[int] = set()
    for index in sorted(near, key=lambda index: (-_area(seen, index), index)):
        equal = [other for other in near[index] if other in kept]
        if equal:
            gone[index] = min(equal, key=lambda other: (-_area(seen, other), other))
        else:
            kept.add(index)
    return gone


def _among(pairs: Pairs, stays: dict[int, int]) -> Iterator[tuple[int, int]]:
    for one, other in pairs.tolist():
        if one in stays and other in stays:
            yield one, other


def _merged(removed: dict[int, Removal]) -> dict[int, list[int]]:
    """The kept pairs that have exact copies, and these."""
    merged: dict[int, list[int]] = {}
    for index, removal in removed.items():
        if removal.reason == "equal image":
            merged.setdefault(removal.equals, []).append(index)
    return merged


def _write_pairs(
    out: Path, source: Source, kept: Sequence[int], merged: dict[int, list[int]], progress: Progress | None
) -> int:
    """Write the kept pairs to files of about FILE_BYTES; returns their number."""
    pairs = _kept(source, kept, merged, progress)
    pair, number = next(pairs, None), 0
    while pair is not None:

        def write(path: Path) -> None:
            nonlocal pair
            size = 0
            with pq.ParquetWriter(path, _SCHEMA) as writer:
                while pair is not None and size < FILE_BYTES:
                    rows: list[dict[str, Any]] = []
                    while pair is not None and len(rows) < ROWS and size < FILE_BYTES:
                        size += len(pair.image)
                        captions = [valid(text) for text in pair.captions]
                        label = None if pair.label is None else valid(pair.label)
                        rows.append({"key": valid(pair.key), "image": pair.image, "captions": captions, "label": label})
                        pair = next(pairs, None)
                    writer.write_table(pa.Table.from_pylist(rows, _SCHEMA), row_group_size=ROWS)

        write_atomically(out / f"part-{number:05d}.parquet", write)
        number += 1
    return number


def _kept(
    source: Source, kept: Sequence[int], merged: dict[int, list[int]], progress: Progress | None
) -> Iterator[Pair]:
    for done, index in enumerate(kept, start=1):
        pair = source[index]
        captions = [*pair.captions, *(text for copy in merged.get(index, ()) for text in source.captions(copy))]
        if progress:
            progress("writing pairs", done, len(kept))
        yield Pair(pair.key, pair.image, tuple(dict.fromkeys(captions)), pair.label, pair.where)


def _why(source: Source, index: int) -> str:
    """What is wrong with a broken pair."""
    try:
        fingerprint(source[index].image)
    except BrokenPair as error:
        return error.reason
    except ValueError as error:
        return str(error)
    return "it could not be read"


def _write_removed(path: Path, source: Source, test: Source | None, removed: dict[int, Removal]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            for index, removal in removed.items():
                equal = test if removal.in_test else source
                reason = f"broken: {_why(source, index)}" if removal.reason == "broken" else removal.reason
                row = {
                    "place": source.where(index),
                    "key": source.key(index),
                    "reason": reason,
                    "equals": None if removal.equals < 0 or equal is None else equal.where(removal.equals),
                }
                file.write(json.dumps(row) + "\n")

    write_atomically(path, write)
