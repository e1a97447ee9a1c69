"""Whether a model's probabilities can be believed, and what corruptions of the images do to its figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from declip.evaluation.details import Calibration, Details
from declip.evaluation.report.charts import Line, line_chart
from declip.evaluation.report.judgements import Models, Section, grouped, named_metric, subheading, table
from declip.evaluation.report.parts import words

_SIDE, _LEFT, _TOP, _BOTTOM = 300, 46, 10, 40  # of a reliability diagram: its plot's side, and what is around it
_SEVERITIES = 5


# --- calibration ------------------------------------------------------------------------------------------------------


def calibration(models: Models, details: Sequence[Details]) -> Section:
    parts = []
    judged = (each for each in details if each.calibration)
    for (data, task), own in grouped(judged, lambda each: (each.data, each.task)).items():
        found = [(each.model, each.calibration) for each in own if each.calibration]
        legend = models.legend(name for name, _ in found)
        parts.append(
            f'<div class="block">{subheading(data, task, legend)}<div class="calibration">{_diagram(models, found)}'
            f"{_errors(models, found)}</div></div>"
        )
    note = (
        "Of the answers that a calibrated model gives with 80&nbsp;% confidence, 80&nbsp;% are right: its points lie on"
        " the dashed line. Beneath it a model is too sure of itself, above it too modest. Larger points stand for more"
        " images. The expected calibration error (ECE) is the mean distance from the line, in percent."
    )
    return Section("Calibration", note, "".join(parts))


def _diagram(models: Models, found: Sequence[tuple[str, Calibration]]) -> str:
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = _LEFT + _SIDE * tick, _TOP + _SIDE * (1 - tick)
        kind = "grid" if tick else "axis"
        parts.append(f'<path class="{kind}" d="M{_LEFT} {y:.1f}H{_LEFT + _SIDE}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.0%}</text>')
        parts.append(f'<text x="{x:.1f}" y="{_TOP + _SIDE + 17}" text-anchor="middle">{tick:.0%}</text>')
    parts.append(f'<path class="ideal" d="M{_LEFT} {_TOP + _SIDE}L{_LEFT + _SIDE} {_TOP}"/>')
    for name, measured in found:
        points = [(_LEFT + _SIDE * x, _TOP + _SIDE * (1 - y), share) for x, y, share in measured.bins]
        colour = models.colour(name)
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in points)
        parts.append(f'<path class="line {colour}" d="{path}"/>' if points else "")
        for (x, y, share), (confidence, accuracy, _) in zip(points, measured.bins, strict=True):
            said = f"{name}: {confidence:.0%} sure, {accuracy:.0%} right, {share:.1%} of the images"
            radius = 2.5 + 11 * share**0.5
            parts.append(
                f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"><title>{escape(said)}</title>'
                "</circle>"
            )
    x = _LEFT + _SIDE / 2
    parts.append(f'<text x="{x}" y="{_TOP + _SIDE + 36}" text-anchor="middle">confidence</text>')
    said = "; ".join(f"{name} has an error of {measured.ece:.1f}%" for name, measured in found)
    return (
        '<figure class="chart reliability"><figcaption><strong>Reliability</strong> <span>share of right answers over'
        f' confidence</span></figcaption><svg viewBox="0 0 {_LEFT + _SIDE + 18} {_TOP + _SIDE + _BOTTOM}" role="img"'
        f' aria-label="{escape(f"Reliability diagram: {said}.")}">{"".join(parts)}</svg></figure>'
    )


def _errors(models: Models, found: Sequence[tuple[str, Calibration]]) -> str:
    rows = []
    for name, measured in found:
        figures = (f"{measured.ece:.1f}", f"{measured.ece_after:.1f}", f"{measured.temperature:.2f}")
        cells = "".join(f'<td class="plain">{figure}</td>' for figure in figures)
        title = f'<th scope="row" class="name">{escape(name)}<small>{_tendency(measured)}</small></th>'
        rows.append(f'<tr class="{models.colour(name)}">{title}{cells}</tr>')
    return (
        f"<div>{table('Calibration errors', ('Model', 'ECE', 'ECE after', 'Temperature'), rows)}"
        '<p class="footnotes">After: with the logits divided by the temperature, which is fitted on one half of the'
        " images and judged on the other, both ways.</p></div>"
    )


def _tendency(measured: Calibration) -> str:
    """Mean confidence against the share of right answers."""
    total = sum(share for _, _, share in measured.bins)
    gap = 100 * sum((x - y) * share for x, y, share in measured.bins) / total if total else 0.0
    if abs(gap) < 1:
        return "as sure as it is right, on the whole"
    return f"{abs(gap):.0f} points {'too sure' if gap > 0 else 'too modest'}, on the whole"


# --- robustness -------------------------------------------------------------------------------------------------------


def robustness(models: Models, details: Sequence[Details]) -> Section:
    """One chart a corruption, one line a model, over severity; 0 is the clean set."""
    parts = []
    for (data, task), own in grouped((each for each in details if each.robustness), lambda d: (d.data, d.task)).items():
        names = dict.fromkeys((found.corruption, found.metric) for each in own for found in each.robustness)
        charts = "".join(_corruption(models, own, *name) for name in names)
        legend = models.legend(each.model for each in own)
        columns = "one" if len(names) == 1 else "three" if len(names) > 2 else ""
        parts.append(
            f'<div class="block">{subheading(data, task, legend)}<div class="charts {columns}">{charts}</div></div>'
        )
    note = "The same images, made worse in five degrees. What counts is how slowly a line falls, and from where."
    return Section("Robustness", note, "".join(parts))


def _corruption(models: Models, details: Sequence[Details], corruption: str, metric: str) -> str:
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in models.names}
    for each in details:
        for found in each.robustness:
            if (found.corruption, found.metric) == (corruption, metric):
                points[each.model] = [(float(severity), value) for severity, value in sorted(found.points)]
    return line_chart(
        words(corruption).capitalize(),
        named_metric(metric),
        [Line(name, number, points[name]) for number, name in enumerate(models.names)],
        x_max=_SEVERITIES,
        x_name="severity",
        x_ticks=[(float(severity), str(severity)) for severity in range(_SEVERITIES + 1)],
        noisy=False,
        from_zero=True,
        number="{:.1f}".format,
        unit="%",
        width=350,
        named=False,
    )
