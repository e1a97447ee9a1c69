"""What the terminal and the page both say of a comparison, from its JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from declip.compare.findings import VIEWS, View

TITLES: dict[View, str] = {
    "pairs seen": "Equal pairs seen",
    "compute": "Equal compute",
    "best": "Each at its best length",
}


def said_factor(factor: dict[str, Any] | None) -> str:
    """A factor for people: ×2.1 (1.6 to 2.9), more than ×4."""
    if factor is None or factor["kind"] == "unknown":
        return "–"
    low, high = factor["low"], factor["high"]
    if factor["kind"] == "more":
        return f"more than ×{factor['factor']:.1f}" + (f" (at least {low:.1f})" if low else " (not sure)")
    if factor["kind"] == "less":
        return f"less than ×{factor['factor']:.2f}"
    return f"×{factor['factor']:.1f} ({said_interval(low, high, 1)})"


def said_interval(low: float, high: float | None, digits: int) -> str:
    """Of a factor. In some resamplings the method never gets there where `low` is 0, the base where `high` is None."""
    if high is None:
        return f"{low:.{digits}f} or more" if low else "not sure"
    return f"{low:.{digits}f} to {high:.{digits}f}" if low else f"up to {high:.{digits}f}"


def said_quality(result: dict[str, Any], method: str, fraction: str, points: dict[str, dict[str, Any]]) -> str:
    """What a method reaches with a fraction, by the points of its line: how many runs say so, where others diverged."""
    if fraction in points:
        point = points[fraction]
        kept, lost = len(point["by_seed"]), point["diverged"]
        return f"{point['quality']:.1f}" + (f" ({kept} of {kept + lost} runs)" if lost else "")
    return "diverged" if lost_runs(result)[method, fraction] else "–"


def lost_runs(result: dict[str, Any]) -> Counter[tuple[str, str]]:
    """How many runs have diverged, by method and fraction."""
    return Counter((row["method"], row["fraction"]) for row in result["diverged"])


ABLATED = ("Variant", "Judged on", "Pairs", "Quality", "Difference", "95 % interval", "Held out", "Compute")


def ablation_rows(result: dict[str, Any]) -> list[list[str]]:
    """What stands under `ABLATED`: each method that has variants, then these, by what they change of it."""
    found = []
    for method, judged in dict.fromkeys((row["method"], row["judged"]) for row in result["ablation"]):
        own = [row for row in result["ablation"] if (row["method"], row["judged"]) == (method, judged)]
        kept = [row for row in own if row["quality"] is not None]
        if kept:
            most = max(kept, key=lambda row: int(row["seeds"]))  # the whole method's runs are those of its seeds
            about = [method, judged, f"{result['pairs'][most['fraction']]:,}", f"{most['of_method']:.1f}", "", ""]
            found.append([*about, f"{most['held_out_of_method']:.1f}", "×1.00"])
        for row in own:
            about = [row["variant"].removeprefix(f"{method} "), judged, f"{result['pairs'][row['fraction']]:,}"]
            if row["quality"] is None:
                found.append([*about, "diverged", "", "", "", ""])
                continue
            low, high = row["interval"]
            said = [f"{row['quality']:.1f}", f"{row['difference']:+.1f}", f"{low:+.1f} to {high:+.1f}"]
            found.append([*about, *said, f"{row['held_out']:.1f}", f"×{row['flops']:.2f}"])
    return found


def views_of(result: dict[str, Any], judged: str) -> list[View]:
    """The views that a set's lines have, one of those that are of the same runs, and none of the base alone."""
    several = len({line["method"] for line in result["lines"]}) > 1
    seen: list[Any] = []
    found: list[View] = []
    for view in VIEWS:
        own = [line for line in result["lines"] if (line["judged"], line["view"]) == (judged, view)]
        runs = [(line["method"], [(p["fraction"], p["pairs_seen"]) for p in line["points"]]) for line in own]
        if runs not in seen and not (several and len(own) == 1):
            found.append(view)
        seen.append(runs)
    return found


def headline(result: dict[str, Any], line: dict[str, Any]) -> dict[str, Any] | None:
    """Of a line the factor at what the base reaches with all pairs."""
    wanted = (line["method"], line["judged"], line["view"], "base")
    own = [f for f in result["factors"] if (f["method"], f["judged"], f["view"], f["read_off"]) == wanted]
    return max(own, key=lambda factor: int(factor["pairs"]), default=None)
