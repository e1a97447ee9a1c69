"""Results as tables for other programs and papers: CSV, Markdown, LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from declip.evaluation.judged import Judged, metric_name

_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "→": r"$\rightarrow$",
    }
)


def as_csv(results: Sequence[Judged]) -> str:
    """A line for each figure: model, data, task, settings, items, metric, value, low, high; no rounding."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "data", "task", "settings", "items", "undecodable", "metric", "value", "low", "high"])
    for judged in results:
        settings = " ".join(f"{name}={value}" for name, value in judged.settings.items() if name != "deviations")
        first = [judged.model, judged.data, judged.task, settings, judged.items, judged.undecodable]
        for metric, value in judged.metrics.items():
            writer.writerow([*first, metric, value, *judged.intervals.get(metric, ("", ""))])
    return out.getvalue()


def as_markdown(results: Sequence[Judged]) -> str:
    """A table for each task, a row for each model and set; the best of a set's models is bold."""
    parts = []
    for task, heads, rows in _by_task(results):
        aligned = ["---", "---", *["--:"] * (len(heads) - 2)]
        lines = [f"**{task}** (95 % interval)", "", *(_line(row) for row in (heads, aligned))]
        lines += [_line([cell.replace("|", r"\|") for cell in _marked(row, best, "**{}**")]) for row, best in rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def as_latex(results: Sequence[Judged]) -> str:
    """A booktabs table for each task, rows as in `as_markdown`, without intervals."""
    parts = []
    for task, heads, rows in _by_task(results, intervals=False):
        lines = [f"% {task}", rf"\begin{{tabular}}{{ll{'r' * (len(heads) - 2)}}}", r"\toprule"]
        lines += [" & ".join(head.translate(_LATEX) for head in heads) + r" \\", r"\midrule"]
        for row, best in rows:
            escaped = [cell.translate(_LATEX) for cell in row]
            lines.append(" & ".join(_marked(escaped, best, r"\textbf{{{}}}")) + r" \\")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _marked(cells: Sequence[str], best: set[int], how: str) -> list[str]:
    return [how.format(cell) if place in best else cell for place, cell in enumerate(cells)]


_Row = tuple[list[str], set[int]]  # cells, and the places of those that are the best of their set


def _by_task(results: Sequence[Judged], intervals: bool = True) -> list[tuple[str, list[str], list[_Row]]]:
    found = []
    for task in dict.fromkeys(judged.task for judged in results):
        own = [judged for judged in results if judged.task == task]
        metrics = list(dict.fromkeys(name for judged in own for name in judged.metrics))
        heads = ["data", "model", "items", *map(metric_name, metrics)]
        found.append((task, heads, [_row(judged, own, metrics, intervals) for judged in own]))
    return found


def _row(judged: Judged, of_task: Sequence[Judged], metrics: Sequence[str], intervals: bool) -> _Row:
    shots = judged.settings.get("shots")
    rivals = [other for other in of_task if (other.data, other.settings.get("shots")) == (judged.data, shots)]
    cells = [judged.data + (f" ({shots} a class)" if shots else ""), judged.model, f"{judged.items:,}"]
    best = set()
    for metric in metrics:
        if metric not in judged.metrics:
            cells.append("–")
            continue
        values = [other.metrics[metric] for other in rivals if metric in other.metrics]
        if len(rivals) > 1 and judged.metrics[metric] == (min if "rank" in metric else max)(values):
            best.add(len(cells))
        cells.append(shown(judged, metric, intervals))
    return cells, best


def shown(judged: Judged, metric: str, interval: bool = True) -> str:
    """``33.4 (31.2–35.6)``."""
    value = f"{judged.metrics[metric]:.1f}"
    if not interval or metric not in judged.intervals:
        return value
    low, high = judged.intervals[metric]
    return f"{value} ({low:.1f}–{high:.1f})"
