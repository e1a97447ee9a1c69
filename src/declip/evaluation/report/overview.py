"""A task's sets side by side, as papers show them: one figure a set, and their mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean

from declip.evaluation.details import Published
from declip.evaluation.judged import Judged
from declip.evaluation.report.judgements import Models, grouped, main_metric, named_metric, source_numbers, table

_SETS = 4  # of fewer the tables by set say enough

_Values = Mapping[str, float]  # of one model by set


def side_by_side(results: Sequence[Judged], published: Sequence[Published]) -> list[Published]:
    """The published figures that the overview of these results shows: of models that have more than one of the sets."""
    if not _wanted(results):
        return []
    metric = main_metric(results)
    first = {(row.model, row.data): row for row in reversed(published) if metric in row.metrics}
    counts = Counter(model for model, _ in first)
    return [row for row in published if first.get((row.model, row.data)) is row and counts[row.model] > 1]


def overview(models: Models, results: Sequence[Judged], published: Sequence[Published], sources: Sequence[str]) -> str:
    """Ours, then the published; `published` as `side_by_side` gives them. Nothing for few sets, or numbers of shots."""
    metric = main_metric(results)
    if not _wanted(results) or metric is None:
        return ""
    sets = list(dict.fromkeys(judged.data for judged in results))
    ours = {
        name: {judged.data: judged.metrics[metric] for judged in own if metric in judged.metrics}
        for name, own in grouped(results, lambda judged: judged.model).items()
    }
    rows = [
        f'<tr class="{models.colour(name)}"><th scope="row" class="name">{escape(name)}</th>'
        f"{_cells(values, sets, list(ours.values()), {})}</tr>"
        for name, values in ours.items()
    ]
    for name, own in grouped(published, lambda row: row.model).items():
        values = {row.data: row.metrics[metric] for row in own}
        marks = {row.data: row.mark for row in own}
        note = source_numbers((row.source for row in own), sources)
        title = f'<th scope="row">{escape(name)} <sup>{note}</sup></th>'
        rows.append(f'<tr class="published">{title}{_cells(values, sets, [], marks)}</tr>')
    heads = (escape(named_metric(metric)), *map(escape, sets), "mean")
    return f'<div class="overview">{table("Sets side by side", heads, rows)}</div>'


def _wanted(results: Sequence[Judged]) -> bool:
    several = len({judged.data for judged in results}) >= _SETS
    return several and not any("shots" in judged.settings for judged in results)


def _cells(values: _Values, sets: Sequence[str], rivals: Sequence[_Values], marks: Mapping[str, str]) -> str:
    cells = []
    for data in sets:
        text = f"{values[data]:.1f}" if data in values else "–"
        best = max((own[data] for own in rivals if data in own), default=0.0)
        if len(rivals) > 1 and text == f"{best:.1f}":
            text = f"<strong>{text}</strong>"
        cells.append(f'<td class="plain">{text}<i class="mark">{escape(marks.get(data, ""))}</i></td>')
    mean = f"{fmean(values.values()):.1f}" if len(values) == len(sets) else "–"
    return f'{"".join(cells)}<td class="plain start">{mean}</td>'
