"""Rows of a text table that name the same image become one pair, without a Python object for each name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

# What a pair is in the index of a text table: large types, as a million captions may be more than 2 GB.
SCHEMA = pa.schema(
    [
        pa.field("image", pa.large_string()),
        pa.field("captions", pa.large_list(pa.large_string())),
        pa.field("label", pa.large_string()),
        pa.field("key", pa.large_string()),
        pa.field("line", pa.int64()),
    ]
)
_ROWS = 2**17  # that are put together at a time, unless one name has more

Numbers = NDArray[np.int64]


def name_hash(name: str, salt: int) -> int:
    """64 bits of a file name."""
    return hash((salt, name)) if salt else hash(name)


class _Collision(Exception):
    """Two names of one hash."""


def grouped(batches: Sequence[pa.RecordBatch], hashes: Numbers) -> Iterator[pa.RecordBatch] | None:
    """Batches of SCHEMA with one row a name, in the order that the names first come in; None where all differ already.

    The captions of a name are collected in the order of its rows; all else is its first row's. `hashes` [rows] are the
    names' by ``name_hash`` with salt 0. Where two names have the same, all are hashed anew.
    """
    salt = 0
    while True:
        order = _order(hashes)
        if order is None:
            return None
        rows, ends = order
        try:
            for merged in _merged(batches, rows, ends, names_only=True):
                del merged
        except _Collision:
            salt += 1
            names = (str(name) for batch in batches for name in batch.column("image").to_pylist())
            hashes = np.fromiter((name_hash(name, salt) for name in names), np.int64, len(hashes))
            continue
        return _merged(batches, rows, ends)


def _order(hashes: Numbers) -> tuple[Numbers, Numbers] | None:
    """The rows with those of equal hashes side by side [rows], and where each hash's end among them [names]."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    del ordered
    if len(starts) == len(hashes):
        return None
    counts = np.diff(starts, append=len(hashes))
    by_first = np.argsort(order[starts])  # the sort is stable, so the first row of each is its smallest
    counts, starts = counts[by_first], starts[by_first]
    ends = np.cumsum(counts)
    places = np.repeat(starts - (ends - counts), counts)
    places += np.arange(len(hashes))
    return order[places], ends


def _merged(
    batches: Sequence[pa.RecordBatch], rows: Numbers, ends: Numbers, *, names_only: bool = False
) -> Iterator[pa.RecordBatch]:
    """The rows of each name put together. Raises _Collision where they are not of one name."""
    if names_only:
        batches = [batch.select(["image"]) for batch in batches]
    first_rows = np.cumsum([0] + [len(batch) for batch in batches])
    begin = start = 0
    while begin < len(ends):
        stops = ends[begin : max(int(np.searchsorted(ends, start + _ROWS)), begin + 1)]
        bounds = np.concatenate([[0], stops - start])
        taken = _take(batches, first_rows, rows[start : stops[-1]])
        begin, start = begin + len(stops), int(stops[-1])
        names = taken.column("image")
        firsts = np.repeat(bounds[:-1], np.diff(bounds))
        if not pc.all(pc.equal(names, names.take(pa.array(firsts)))).as_py():
            raise _Collision
        if names_only:
            continue
        one_each = taken.take(pa.array(bounds[:-1], pa.int64()))
        lists: Any = taken.column("captions")
        offsets = np.concatenate([[0], np.cumsum(np.asarray(pc.list_value_length(lists)))])
        captions = pa.LargeListArray.from_arrays(pa.array(offsets[bounds], pa.int64()), lists.flatten())
        columns = [captions if name == "captions" else one_each.column(name) for name in SCHEMA.names]
        yield pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _take(batches: Sequence[pa.RecordBatch], first_rows: Numbers, rows: Numbers) -> pa.RecordBatch:
    """Rows out of many batches; taking from a table would first copy all of it."""
    which = np.searchsorted(first_rows, rows, side="right") - 1
    order = np.argsort(which, kind="stable")
    numbers, starts = np.unique(which[order], return_index=True)
    parts = []
    for number, places in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        parts.append(batches[number].take(pa.array(rows[places] - first_rows[number], pa.int64())))
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    joined = pa.Table.from_batches(parts).combine_chunks().to_batches()[0]
    in_order = len(parts) == 1 and np.array_equal(back, np.arange(len(back)))
    return joined if in_order else joined.take(pa.array(back, pa.int64()))
