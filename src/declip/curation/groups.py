"""Pairs that show one picture, as groups: what a split must not tear apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from declip.curation.copies import Copies, find_copies
from declip.curation.scan import scan
from declip.data.sources import Source, connected
from declip.progress import Progress


def picture_groups(source: Source, workers: int, progress: Progress | None = None) -> NDArray[np.int64]:
    """For each pair the number of its group: int64 [pairs].

    Copies, exact or near, are one group, and so are copies of copies. A pair whose picture cannot be read is a group
    of its own. Groups are numbered by their first pair; which pairs are together does not depend on the pairs' order.
    """
    return grouped(find_copies(scan(source, workers, progress, "looking for copies")))


def grouped(copies: Copies) -> NDArray[np.int64]:
    """The groups that copies within a source make: int64 [pairs], numbered by their first pair."""
    exact = copies.exact()
    return connected(len(copies.first), np.concatenate([exact, copies.near]))
