"""What others have published, to stand beside our own figures: docs/published.md as data.

`published.json` holds the zero-shot, retrieval and linear-probe tables of that page under the catalogue's names of the
sets. Figures that the page marks ‡, from memory, are not to be quoted, so they are not among them; an ImageNet figure
that stands on the page twice is here from its better source.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from declip.evaluation.details import Published


def published_rows(data: str, task: str) -> list[Published]:
    """The published figures of a set, by the catalogue's name, for ``zero-shot``, ``retrieval``, ``linear-probe``."""
    found = _found()
    rows = [row for row in found["rows"] if row["task"] == task and data in row["metrics"]]
    sources = ["; ".join(found["sources"][letter] for letter in row["sources"]) for row in rows]
    return [
        Published(row["model"], data, task, row["metrics"][data], row["mark"], source)
        for row, source in zip(rows, sources, strict=True)
    ]


@cache
def _found() -> Any:
    return json.loads(files("declip.evaluation").joinpath("published.json").read_text(encoding="utf-8"))
