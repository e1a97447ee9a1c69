"""Which images of a test set were trained on: what a model has seen, it need not understand."""

from __future__ import annotations

import os

import numpy as np

from declip.curation.copies import find_copies
from declip.curation.scan import Scan, scan
from declip.data.sources import Source
from declip.evaluation.details import Overlap
from declip.progress import Progress

MOST = 200_000
"""Training pairs that are looked through without being asked to: minutes."""

_SHOWN = 5


def overlap(
    model: str,
    data: str,
    test: Source,
    train: Source,
    progress: Progress | None = None,
    looked_at: dict[int, Scan] | None = None,
    most: int = MOST,
) -> Overlap:
    """Copies and near copies between the pairs that a model is judged on and those that it was trained on.

    model, data: what they are called; looked_at: scans by the source's id, made once for several models or sets.
    Where there are more than `most` training pairs none are looked through, and that is said.
    """
    if len(train) > most:
        reason = f"{len(train):,} training pairs are more than are looked through unasked"
        return Overlap(model, data, len(test), 0, 0, checked=False, reason=reason)
    looked_at = {} if looked_at is None else looked_at
    scans = []
    for what, source in ((f"test pairs {data}", test), (f"training pairs {train.name}", train)):
        # Not by name: parts of one file are called alike. A scan holds its source, so that no other has its id.
        if id(source) not in looked_at:
            workers = max(1, (os.cpu_count() or 1) - 1)
            looked_at[id(source)] = scan(source, workers, progress, f"looking for copies: {what}")
        scans.append(looked_at[id(source)])
    found = find_copies(scans[0], scans[1])
    exact, near = (np.unique(pairs[:, 0]) for pairs in (found.test_exact, found.test_near))
    examples = tuple(test.key(int(row)) for row in np.concatenate([exact, near])[:_SHOWN])
    return Overlap(model, data, len(test), len(exact), len(near), examples)
