"""A task's sets side by side, as papers show them: one figure a set, and their mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean

from declip.evaluation.details import Published
from declip.evaluation.judged import Judged
from declip.evaluation.report.judgements import Models, grouped, main_metric, named_metric, table

_SETS = 4  # of fewer the tables by set say enough

_Values = Mapping[str, float]  # of one model by set


def overview(models: Models, results: Sequence[Judged], published: Sequence[Published]) -> str:
    """Ours, then those published for more than one of the sets. Nothing for few sets, or several numbers of shots."""
    sets = list(dict.fromkeys(judged.data for judged in results))
    metric = main_metric(results)
    if len(sets) < _SETS or metric is None or any("shots" in judged.settings for judged in results):
        return ""
    ours = {
        name: {judged.data: judged.metrics[metric] for judged in own if metric in judged.metrics}
        for name, own in grouped(results, lambda judged: judged.model).items()
    }
    theirs = {
        name: {row.data: row.metrics[metric] for row in own if metric in row.metrics}
        for name, own in grouped(published, lambda row: f"{row.model} {row.mark}".rstrip()).items()
    }
    rows = [_row(name, values, sets, list(ours.values()), models.colour(name)) for name, values in ours.items()]
    rows += [_row(name, values, sets, (), "published") for name, values in theirs.items() if len(values) > 1]
    return f'<div class="overview">{table((named_metric(metric), *map(escape, sets), "mean"), rows)}</div>'


def _row(name: str, values: _Values, sets: Sequence[str], rivals: Sequence[_Values], kind: str) -> str:
    cells = []
    for data in sets:
        best = max((own[data] for own in rivals if data in own), default=0.0)
        text = f"{values[data]:.1f}" if data in values else "–"
        bold = len(rivals) > 1 and text == f"{best:.1f}"
        cells.append(f'<td class="plain">{f"<strong>{text}</strong>" if bold else text}</td>')
    mean = f"{fmean(values.values()):.1f}" if len(values) == len(sets) else "–"
    named = "" if kind == "published" else ' class="name"'
    title = f'<th scope="row"{named}>{escape(name)}</th>'
    return f'<tr class="{kind}">{title}{"".join(cells)}<td class="plain start">{mean}</td></tr>'
