"""What is in a set of pairs, what is wrong with it, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from declip.curation.copies import find_copies
from declip.curation.findings import find, holders
from declip.curation.scan import Scan, scan
from declip.data.sources import Source, Subset, open_sources
from declip.pairs import Data
from declip.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

MOST_REPEATED = 20


def inspect(
    specs: Sequence[str],
    data: Data,
    out: Path | None,
    *,
    test: Sequence[str] = (),
    batch_size: int = 256,
    image_size: int = 224,
    context_length: int = 77,
    workers: int = 1,
    sample: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read every pair once and say what there is.

    out: folder that ``report.html`` is written to, made if need be (None: no report); test: a set that training must
    not have seen; batch_size, image_size, context_length: of the run that the pairs are for; workers: processes;
    sample: look at so many pairs only, drawn at random; progress: called with (what, done, total).

    Returns what the JSON says: ``{"data", "test", "looked_at", "counts", "findings", "histograms",
    "repeated_captions"}``. Raises InputError where a source cannot be read, RunStopped where a process was killed.
    Memory: about 0.9 kB a pair.
    """
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before everything is read
    source = _some(open_sources(specs, data, need_captions=False), sample)
    other = open_sources(test, data, need_captions=False) if test else None
    seen = scan(source, workers, progress, "reading pairs")
    seen_test = scan(other, workers, progress, "reading the test set") if other is not None else None
    findings = find(seen, find_copies(seen, seen_test), seen_test, data, batch_size, image_size, context_length)
    result = {
        "data": [str(spec) for spec in specs],
        "test": [str(spec) for spec in test],
        "looked_at": len(source),
        "counts": _counts(seen),
        "findings": [finding.as_json() for finding in findings],
        "histograms": _histograms(seen),
        "repeated_captions": _repeated(seen),
    }
    if out is not None:
        from declip.curation.report import write_inspection

        write_inspection(out / "report.html", result, findings, source, other, seen.whole)
    return result


def _some(source: Source, sample: int | None) -> Source:
    if sample is None or sample >= len(source):
        return source
    drawn = np.random.default_rng(0).choice(len(source), max(1, sample), replace=False)
    return Subset(source, np.sort(drawn))


def _counts(seen: Scan) -> dict[str, int]:
    return {
        "pairs": len(seen.pairs),
        "images": len(seen.whole),
        "captions": len(seen.captions),
        "different_captions": len(np.unique(seen.captions["hash"])),
        "labelled": int(seen.pairs["labelled"].sum()),
        "labels": len(seen.labels),
        "image_bytes": int(seen.pairs["data_bytes"].sum()),
    }


def _repeated(seen: Scan) -> list[dict[str, Any]]:
    """The captions that most pairs hold, as the first of these writes them."""
    if not len(seen.captions):
        return []
    hashes, counts = holders(seen)
    most = np.argsort(-counts, kind="stable")[:MOST_REPEATED]
    return [_repeat(seen, hashes[i], int(counts[i])) for i in most if counts[i] > 1]


def _repeat(seen: Scan, caption: int, count: int) -> dict[str, Any]:
    at = int(np.argmax(seen.captions["hash"] == caption))
    pair = int(seen.captions["pair"][at])
    number = at - int(np.searchsorted(seen.captions["pair"], pair))
    return {"caption": seen.source.captions(pair)[number][:300], "pairs": count}


def _histograms(seen: Scan) -> dict[str, dict[str, Any]]:
    """Each ``{"title", "note", "bins": [[label, count], …]}``."""
    pairs = seen.pairs[seen.whole]
    short = np.minimum(pairs["width"], pairs["height"])
    drawn = {
        "short_side": ("Shorter side", "pixels", _binned(short, (32, 64, 128, 224, 336, 512, 768, 1024))),
        "ratio": (
            "Shape",
            "width to height",
            _binned(pairs["width"] / np.maximum(pairs["height"], 1), (0.25, 0.5, 0.75, 0.95, 1.05, 1.34, 2, 4)),
        ),
        "image_kb": (
            "Size of an image",
            "kB, encoded",
            _binned(pairs["data_bytes"] / 1000, (2, 5, 10, 20, 50, 200, 1000)),
        ),
        "tokens": (
            "Length of a caption",
            "CLIP tokens, with start and end",
            _binned(seen.captions["tokens"], (6, 10, 14, 18, 24, 32, 48, 78)),
        ),
        "captions": ("Captions a pair", "", _binned(seen.pairs["captions"], (1, 2, 3, 4, 5, 6, 10))),
        "kinds": ("Image format", "", _most(seen.kinds)),
        "scripts": ("Script", "that most letters of a caption are in", _most(seen.scripts)),
        "labels": ("Labels", "", _most(seen.labels)),
    }
    return {name: {"title": title, "note": note, "bins": bins} for name, (title, note, bins) in drawn.items() if bins}


def _binned(values: Any, edges: Sequence[float]) -> list[list[Any]]:
    """Counts below the first edge, between each two, and from the last on; the empty ends are left out."""
    if not len(values):
        return []
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1).tolist()
    whole = all(isinstance(edge, int) for edge in edges) and np.issubdtype(values.dtype, np.integer)
    names = [f"< {edges[0]:g}"]
    for low, high in pairwise(edges):
        names.append(f"{low:g}" if whole and high == low + 1 else f"{low:g}–{high - 1 if whole else high:g}")
    names.append(f"≥ {edges[-1]:g}")
    filled = [i for i, count in enumerate(counts) if count]
    return [[names[i], counts[i]] for i in range(filled[0], filled[-1] + 1)]


def _most(counts: Any, limit: int = 8) -> list[list[Any]]:
    common = [[name, count] for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    rest = sum(count for _, count in common[limit:])
    return common[:limit] + ([[f"{len(common) - limit:,} others", rest]] if rest else [])


def print_inspection(result: dict[str, Any], console: Console) -> None:
    """The findings as a table, what asks for action first."""
    from rich.table import Table
    from rich.text import Text

    counts = result["counts"]
    console.print(
        f"{counts['pairs']:,} pairs, {counts['captions']:,} captions, {counts['labels']:,} labels, "
        f"{counts['image_bytes'] / 1e6:,.1f} MB of images",
        highlight=False,
    )
    table = Table(show_lines=True, header_style="bold")
    table.add_column("")
    table.add_column("What was found", ratio=3)
    table.add_column("What to do", ratio=2)
    styles = {"act": "bold red", "look": "yellow", "fine": "green"}
    for finding in result["findings"]:
        if finding["severity"] == "fine":
            continue
        says = Text(finding["says"])
        if finding["examples"]:
            says.append(f"\nfirst: {finding['examples'][0][:200]}", style="dim")
        table.add_row(Text(finding["severity"], styles[finding["severity"]]), says, Text(finding["advice"]))
    if fine := " ".join(finding["says"] for finding in result["findings"] if finding["severity"] == "fine"):
        table.add_row(Text("fine", styles["fine"]), Text(fine), "")
    console.print(table)
