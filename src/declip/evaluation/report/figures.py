"""The tables of an evaluation: our figures with their intervals, published ones beneath; curves over shots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

from declip.evaluation.details import Published
from declip.evaluation.judged import Judged
from declip.evaluation.report.charts import Line, line_chart
from declip.evaluation.report.judgements import (
    Models,
    Section,
    grouped,
    lower_is_better,
    main_metric,
    named_metric,
    place,
    source_numbers,
    split_metric,
)
from declip.evaluation.report.overview import overview, side_by_side
from declip.evaluation.report.parts import RETRIEVAL, cut, words

_MARKS = {
    "†": "third party: not read in a page or paper by the authors of the figure, or inferred",
    "‡": "from memory, not verified: do not quote",
}


def figures(models: Models, results: Sequence[Judged], published: Sequence[Published]) -> Section:
    parts = []
    for task, own in grouped(results, lambda judged: judged.task).items():
        sets = {judged.data for judged in own}
        beside = [row for row in published if row.task == task and row.data in sets]
        across = side_by_side(own, beside)
        sources = list(dict.fromkeys(row.source for row in beside))
        tables = overview(models, own, across, sources)
        tables += _table(models, task, own, [row for row in beside if row not in across], sources)
        tables += _footnotes(beside, sources)
        parts.append(f"<h3>{escape(_title(task))}</h3>{tables}{_shots(models, task, own)}")
    note = "In percent but for ranks, 1 being best. Beneath each figure stands its 95&nbsp;% interval"
    note += ", and the best of a set is bold." if len(models.names) > 1 else "."
    if any(RETRIEVAL.search(metric) for judged in results for metric in judged.metrics):
        note += " R@5 is the share of queries that have a right answer among the first five."
    return Section("Results", note, "".join(parts))


def _title(task: str) -> str:
    named = words(task)
    return named[:1].upper() + named[1:]


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    metric: str
    shots: object  # None but for what was judged with several numbers of them, which then stand side by side
    group: str
    title: str
    start: bool = False  # of a group

    @property
    def kind(self) -> str:
        return "start" if self.start else ""


_Cells = dict[object, Judged]  # a row's figures by the number of shots


def _columns(results: Sequence[Judged]) -> list[_Column]:
    """All metrics; those of retrieval come by direction, whose names stand above them, and those of shots by metric."""
    shots = _numbers(judged.settings.get("shots") for judged in results)
    found = []
    for metric in dict.fromkeys(metric for judged in results for metric in judged.metrics):
        if len(shots) > 1:
            found += [_Column(metric, count, f"{named_metric(metric)}, by shots", str(count)) for count in shots]
            continue
        found.append(_Column(metric, shots[0], *split_metric(metric)))
    groups = grouped(found, lambda column: column.group).values()
    return [replace(column, start=number == 0) for group in groups for number, column in enumerate(group)]


def _numbers(shots: Iterable[object]) -> list[object]:
    """Each once, in order; what is no number comes last."""
    return sorted(set(shots), key=lambda count: (not isinstance(count, int), count if isinstance(count, int) else 0))


def _table(
    models: Models, task: str, results: Sequence[Judged], published: Sequence[Published], sources: Sequence[str]
) -> str:
    """A part for each set: our rows, then the published ones."""
    columns = _columns(results)
    bodies = []
    for data, own in grouped(results, lambda judged: judged.data).items():
        rows = [_set_row(data, own, len(columns))]
        rows += [_row(models, cells, own, columns) for cells in _rows(own)]
        rows += [_published(row, columns, sources) for row in published if row.data == data]
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    region = f'<div class="card scroll" tabindex="0" role="region" aria-label="{escape(task)}"><table class="figures">'
    return f"{region}{_head(columns)}{''.join(bodies)}</table></div>"


def _rows(results: Sequence[Judged]) -> list[_Cells]:
    """A row a model, or several where it was judged in several ways with the same number of shots."""
    rows: list[_Cells] = []
    for own in grouped(results, lambda judged: judged.model).values():
        rows.append({})
        for judged in own:
            if judged.settings.get("shots") in rows[-1]:
                rows.append({})
            rows[-1][judged.settings.get("shots")] = judged
    return rows


def _head(columns: Sequence[_Column]) -> str:
    groups = grouped(columns, lambda column: column.group)
    head = ""
    if any(groups):
        cells = (f'<th class="group start" scope="colgroup" colspan="{len(c)}">{g}</th>' for g, c in groups.items())
        head = f"<tr><td></td>{''.join(cells)}</tr>"
    titles = "".join(f'<th scope="col" class="{column.kind}">{escape(column.title)}</th>' for column in columns)
    return f'<thead>{head}<tr><th scope="col">Model</th>{titles}</tr></thead>'


def _set_row(data: str, own: Sequence[Judged], columns: int) -> str:
    counts = dict.fromkeys(_counts(judged) for judged in own)
    counted = "; ".join(counts if len(counts) == 1 else dict.fromkeys(f"{j.model}: {_counts(j)}" for j in own))
    return (
        f'<tr class="set"><th scope="rowgroup" colspan="{columns + 1}"><span>{escape(data)} '
        f"<small>{escape(counted)}</small></span></th></tr>"
    )


def _counts(judged: Judged) -> str:
    said = f"{judged.items:,} {'image' if judged.items == 1 else 'images'}"
    if judged.undecodable:
        said += f", {judged.undecodable:,} of them undecodable and counted as wrong"
    return f"{said}, {judged.skipped:,} pairs skipped" if judged.skipped else said


def _row(models: Models, cells: _Cells, rivals: Sequence[Judged], columns: Sequence[_Column]) -> str:
    judged = next(iter(cells.values()))
    settings = (
        ""
        if len(cells) > 1
        else ", ".join(
            f"{words(name)} {value:.4g}" if isinstance(value, float) else f"{words(name)} {value}"
            for name, value in judged.settings.items()
            if isinstance(value, str | int | float)
        )
    )
    note = f"<small>{escape(cut(settings))}</small>" if settings else ""
    name = f'<th scope="row" class="name">{escape(judged.model)}{note}</th>'
    drawn = "".join(_cell(cells.get(column.shots), rivals, column) for column in columns)
    return f'<tr class="{models.colour(judged.model)}">{name}{drawn}</tr>'


def _cell(judged: Judged | None, rivals: Sequence[Judged], column: _Column) -> str:
    metric = column.metric
    if judged is None or metric not in judged.metrics:
        return f'<td class="{column.kind}"><span class="value">–</span></td>'
    text, kind = f"{judged.metrics[metric]:.1f}", column.kind
    values = [other.metrics[metric] for other in rivals if metric in other.metrics and place(other) == place(judged)]
    if len(values) > 1 and text == f"{(min if lower_is_better(metric) else max)(values):.1f}":
        text, kind = f"<strong>{text}</strong>", f"{kind} best"
    interval = judged.intervals.get(metric)
    beneath = f'<span class="interval">{interval[0]:.1f}–{interval[1]:.1f}</span>' if interval else ""
    if not lower_is_better(metric):
        beneath += _bar(judged.metrics[metric], interval)
    return f'<td class="{kind}"><span class="value">{text}</span>{beneath}</td>'


def _bar(value: float, interval: tuple[float, float] | None) -> str:
    """The figure as a share of 100, and its interval as a darker stretch."""
    low, high = (min(100.0, max(0.0, end)) for end in interval or (0.0, 0.0))
    stretch = f'<u style="left:{low:.1f}%;width:{high - low:.1f}%"></u>' if interval else ""
    return (
        f'<span class="bar" aria-hidden="true"><i style="width:{min(100.0, max(0.0, value)):.1f}%"></i>{stretch}</span>'
    )


def _published(row: Published, columns: Sequence[_Column], sources: Sequence[str]) -> str:
    note = f"<sup>{escape(row.mark)} {source_numbers([row.source], sources)}</sup>"
    values = [f"{row.metrics[column.metric]:.1f}" if column.metric in row.metrics else "–" for column in columns]
    cells = "".join(f'<td class="{column.kind}">{value}</td>' for column, value in zip(columns, values, strict=True))
    return f'<tr class="published"><th scope="row">{escape(row.model)} {note}</th>{cells}</tr>'


def _footnotes(published: Sequence[Published], sources: Sequence[str]) -> str:
    if not published:
        return ""
    said = [f"{mark} {text}." for mark, text in _MARKS.items() if any(mark in row.mark for row in published)]
    said += [
        f"<span><sup>{number}</sup>&nbsp;{escape(source)}.</span>" for number, source in enumerate(sources, start=1)
    ]
    return (
        '<p class="footnotes">Rows in italics are published figures, measured by others, often with other prompts and'
        f" other pairs. {' '.join(said)}</p>"
    )


# --- curves -----------------------------------------------------------------------------------------------------------


def _shots(models: Models, task: str, results: Sequence[Judged]) -> str:
    """A chart for each set that was judged with several numbers of shots."""
    drawn = []
    for data, own in grouped((judged for judged in results if "shots" in judged.settings), lambda j: j.data).items():
        shots = _numbers(judged.settings["shots"] for judged in own)
        metric = main_metric(own)
        if len(shots) < 2 or metric is None:
            continue
        lines = [_shots_line(models, name, own, shots, metric) for name in models.names]
        axis = [(float(number), str(count)) for number, count in enumerate(shots)]
        note = f"{named_metric(metric)} over training images per class"
        chart = line_chart(
            data,
            note,
            lines,
            x_max=len(shots) - 1.0,
            x_name="shots",
            x_ticks=axis,
            noisy=False,
            number="{:.1f}".format,
            unit="%",
        )
        drawn.append(chart)
    return f'<div class="charts{" one" * (len(drawn) == 1)} spaced">{"".join(drawn)}</div>' if drawn else ""


def _shots_line(models: Models, name: str, results: Sequence[Judged], shots: Sequence[object], metric: str) -> Line:
    values: Mapping[object, float] = {
        judged.settings["shots"]: judged.metrics[metric]
        for judged in results
        if judged.model == name and metric in judged.metrics
    }
    points = [(float(number), values[count]) for number, count in enumerate(shots) if count in values]
    return Line(name, models.names.index(name), points)
