"""The comparison as one page: curves, factors, compute, ablation, how the runs learnt."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import Any

from declip.compare.findings import VIEWS, Findings, Ran, outcomes
from declip.compare.prepare import Prepared
from declip.compare.summary import ABLATED, TITLES, ablation_rows, lost_runs, said_interval, views_of
from declip.evaluation.report.charts import Line, compact, line_chart
from declip.evaluation.report.judgements import Models, Section
from declip.evaluation.report.parts import setup
from declip.evaluation.report.style import page
from declip.files import write_atomically

_SIDE = 0.35  # of a step of the axis, left free beside its ends
_STYLE = """
td.over { color: var(--ink) } .card + .note { margin-top: 22px } .charts + .charts { margin-top: 20px }
.wraps { display: block; min-width: 14em; white-space: normal }
"""


def write_report(
    path: Path, prepared: Prepared, ran: Sequence[Ran], findings: Findings, result: dict[str, Any]
) -> None:
    """Write the page to `path` in one move."""
    models = Models(tuple(method.name for method in prepared.methods))
    sections = [
        _quality(models, prepared, result),
        _factors(models, prepared, result),
        _compute(models, prepared, ran, result),
        _ablation(result),
        _learning(models, prepared, ran),
        _runs(models, result),
        _rates(models, result),
    ]
    body = "\n".join(section.html() for section in sections if section.body) + setup(_facts(prepared, result))
    title, intro = _title(result), _intro(prepared, result)
    header = f'<p class="eyebrow">declip compare</p><h1>{title}</h1><p class="intro">{intro}</p>'
    text = page("What a pair is worth", header, body, _STYLE)
    write_atomically(path, lambda place: place.write_text(text, "utf-8"))


def _title(result: dict[str, Any]) -> str:
    """The largest factor at what the base reaches with all pairs, of runs as long as the base's."""
    judged, most = next(iter(result["judged"])), max(result["pairs"].values())
    known = [
        factor
        for factor in result["factors"]
        if (factor["judged"], factor["view"], factor["read_off"]) == (judged, "pairs seen", "base")
        and factor["pairs"] == most
        and factor["kind"] in ("exact", "more")
        and factor["low"] > 1  # what may be chance is no headline
    ]
    if not known:
        return "What a pair is worth"
    best = max(known, key=lambda factor: factor["factor"])
    more = "more than " if best["kind"] == "more" else ""
    method, base = escape(best["method"]), escape(result["base"])
    whole = "all " * ("1" in result["pairs"])
    return f"A pair is worth {more}{best['factor']:.1f} with {method}, at the quality {base} has from {whole}{most:,}"


def _intro(prepared: Prepared, result: dict[str, Any]) -> str:
    seeds = f"{result['seeds']} seeds" if result["seeds"] > 1 else "one seed"
    most, count = max(result["pairs"].values()), len(result["pairs"])
    fractions = f"{count} nested fractions" if count > 1 else "one fraction"
    searched = any(len(of) > 1 for method in result["methods"] for of in method["rates"].values())
    chosen = "the weights of every run" + " and all learning rates" * searched
    return (
        f"{', '.join(escape(method.name) for method in prepared.methods)} on {fractions} of {most:,} pairs, {seeds}. "
        f"Quality is {result['metric']}, on pairs that nothing was trained on or chosen by; {chosen} were chosen on "
        f"{result['held_out']:,} other pairs, held out of training."
    )


class _Axis:
    """Pairs, or compute, on a logarithmic axis."""

    def __init__(self, values: Sequence[float], text: Callable[[float], str]) -> None:
        self.first, self.ticks = min(values), sorted(set(values))
        self.text = text

    def at(self, value: float) -> float:
        return _SIDE + math.log2(value / self.first)

    def options(self) -> dict[str, Any]:
        width = self.at(self.ticks[-1]) + _SIDE
        shown: list[float] = []
        for tick in self.ticks:
            if not shown or self.at(tick) - self.at(shown[-1]) > width / 8:  # or their numbers would overlap
                shown.append(tick)
        return {
            "x_max": width,
            "x_ticks": [(self.at(tick), self.text(tick)) for tick in shown],
            "noisy": False,
            "from_zero": True,
            "number": "{:.1f}".format,
        }


def _quality(models: Models, prepared: Prepared, result: dict[str, Any]) -> Section:
    axis = _Axis([float(pairs) for pairs in result["pairs"].values()], lambda pairs: f"{pairs:,.0f}")
    parts = []
    for judged in result["judged"]:
        charts = []
        for view in views_of(result, judged):
            own = [line for line in result["lines"] if (line["judged"], line["view"]) == (judged, view)]
            drawn = [_line(models, line, axis) for line in own]
            options = axis.options()
            charts.append(line_chart(TITLES[view], VIEWS[view], drawn, width=500, x_name="training pairs", **options))
        columns = "two" if len(charts) > 1 else "one"
        parts.append(f'<h3>{escape(judged)}</h3><div class="charts {columns}">{"".join(charts)}</div>')
    guessing = ", ".join(f"{value:.1f} on {escape(judged)}" for judged, value in result["chance"].items())
    note = (
        f"{result['metric'].capitalize()}, in percent. Broad strokes are 95&nbsp;% intervals over seeds and judged "
        "pictures; of one seed they know nothing of how seeds differ."
    )
    if guessing:
        note += f" Guessing has {guessing}."
    if lost := _lost(result):
        note += f" <strong>Diverged, and not counted: {lost}.</strong>"
    return Section("Quality against pairs", note, "".join(parts))


def _lost(result: dict[str, Any]) -> str:
    """Which runs have diverged: declip with 858 pairs (2), …"""
    lost = lost_runs(result).items()
    return ", ".join(f"{escape(name)} with {result['pairs'][part]:,} pairs ({count})" for (name, part), count in lost)


def _line(models: Models, line: dict[str, Any], axis: _Axis) -> Line:
    points = [(axis.at(point["pairs"]), point["quality"]) for point in line["points"]]
    spans = tuple((axis.at(point["pairs"]), *point["interval"]) for point in line["points"])
    return Line(line["method"], models.names.index(line["method"]), points, spans)


def _factors(models: Models, prepared: Prepared, result: dict[str, Any]) -> Section:
    others = [method.name for method in prepared.methods[1:]]
    parts = []
    for judged in result["judged"] if others else ():
        for view in views_of(result, judged):
            rows = []
            for method in others:
                own = [f for f in result["factors"] if (f["method"], f["judged"], f["view"]) == (method, judged, view)]
                rows += [_factor_row(models, result["base"], method, factor) for factor in own]
            if rows:
                head = ("Method", "Quality", f"{result['base']} needs", "It needs", "Factor", "95 % interval")
                parts.append(f"<h3>{escape(judged)}, {TITLES[view].lower()}</h3>{_table(head, rows)}")
    note = (
        "How many times more pairs the base needs for the same quality: the horizontal distance of the two curves, "
        "made monotone and read between points on a line over the logarithm of the pairs. At the quality of every "
        "point of both curves; “more than” where the base never gets there with all pairs, or the method is there with "
        "its fewest."
    )
    return Section("What a pair is worth", note, "".join(parts))


def _factor_row(models: Models, base: str, method: str, factor: dict[str, Any]) -> list[str]:
    def needs(pairs: float | None) -> str:
        return "outside" if pairs is None else f"{pairs:,.0f}"

    whose = base if factor["read_off"] == "base" else method
    value = "–" if factor["factor"] is None else f"×{factor['factor']:.2f}"
    prefix = {"more": "more than ", "less": "less than "}.get(factor["kind"], "")
    return [
        models.named(method),
        f"{factor['quality']:.1f} ({escape(whose)}, {factor['pairs']:,})",
        needs(factor["base_pairs"]),
        needs(factor["method_pairs"]),
        f"<strong>{prefix}{value}</strong>",
        said_interval(factor["low"], factor["high"], 2),
    ]


def _compute(models: Models, prepared: Prepared, ran: Sequence[Ran], result: dict[str, Any]) -> Section:
    """Quality over floating-point operations and seconds, for the most and the fewest pairs."""
    parts = []
    for judged in result["judged"]:
        charts = []
        for fraction in dict.fromkeys((max(prepared.pairs), min(prepared.pairs))):
            for what, value in (("TFLOP of the towers", _teraflop), ("seconds of training", _seconds)):
                points = {
                    name: _by_length(ran, name, fraction, judged, result["metric_name"], value) for name in models.names
                }
                title = f"{prepared.pairs[fraction]:,} pairs"
                charts.append(_over(models, points, title, f"{judged}, over {what}", what))
        if any(charts):
            parts.append(f'<h3>{escape(judged)}</h3><div class="charts two">{"".join(charts)}</div>')
    note = (
        "Every length that was run. Operations of the towers are counted, forward and backward, for all views of a "
        f"pair; seconds are of runs that shared a machine, {prepared.jobs} at a time."
    )
    return Section("Quality against compute", note, "".join(parts))


def _over(models: Models, points: dict[str, list[tuple[float, float]]], title: str, about: str, what: str) -> str:
    """A chart of each method's points over what they cost; nothing where there are none."""
    values = [x for own in points.values() for x, _ in own]
    if not values:
        return ""
    axis = _Axis(values, compact)
    lines = [Line(name, number, [(axis.at(x), y) for x, y in points[name]]) for number, name in enumerate(models.names)]
    return line_chart(title, about, lines, width=500, x_name=what, **axis.options())


def _teraflop(one: Ran) -> float:
    return one.flops / 1e12


def _seconds(one: Ran) -> float:
    return max(1e-3, float(one.found["summary"]["seconds"]))


def _by_length(
    ran: Sequence[Ran], method: str, fraction: Fraction, judged: str, metric: str, value: Callable[[Ran], float]
) -> list[tuple[float, float]]:
    own = [one for one in ran if (one.cell.method, one.cell.fraction) == (method, fraction) and not one.diverged]
    found = []
    for seen in sorted({one.cell.seen for one in own}):
        runs = [one for one in own if one.cell.seen == seen]
        quality = statistics.mean(float(outcomes(one.found, judged, metric).mean()) for one in runs)
        found.append((statistics.mean(map(value, runs)), quality))
    return sorted(found)


def _ablation(result: dict[str, Any]) -> Section:
    rows = [[_wrapping(variant), *map(escape, cells)] for variant, *cells in ablation_rows(result)]
    note = (
        "Each beside the whole method, on the same subsets, seeds and judged pictures, at the method’s learning rate."
    )
    return Section("Ablation", note, _table(ABLATED, rows) if rows else "")


def _wrapping(changes: str) -> str:
    """What a variant changes, each on as many lines as it takes: the figures beside it stay in sight."""
    lines = re.split(r" (?=\S+=)", changes)
    broken = ["<wbr>".join(map(escape, re.split(r"(?<=[._=,])", line))) for line in lines]
    return f'<span class="wraps">{"<br>".join(broken)}</span>'


def _learning(models: Models, prepared: Prepared, ran: Sequence[Ran]) -> Section:
    """Held-out score and training loss of the first seed, for the fewest and the most pairs."""
    charts = []
    for fraction in sorted({min(prepared.pairs), max(prepared.pairs)}):
        own = {
            name: max(
                (one for one in ran if (one.cell.method, one.cell.fraction, one.cell.seed) == (name, fraction, 0)),
                key=lambda one: one.cell.seen,
                default=None,
            )
            for name in models.names
        }
        longest = max((one.cell.seen for one in own.values() if one), default=0)
        pairs = f"{prepared.pairs[fraction]:,} pairs"
        options: dict[str, Any] = {"x_max": float(longest), "width": 500}
        held_out = [
            Line(name, number, [(row["pairs"], row["score"]) for row in one.found["held_out"]] if one else [])
            for number, (name, one) in enumerate(own.items())
        ]
        losses = [
            Line(
                name,
                number,
                [(row["pairs"], row["loss"]) for row in one.found["losses"] if row["loss"] is not None] if one else [],
            )
            for number, (name, one) in enumerate(own.items())
        ]
        score: dict[str, Any] = {"noisy": False, "from_zero": True, "number": "{:.1f}".format}
        charts.append(
            line_chart(
                f"Held-out score, {pairs}", "percent, on pairs held out of training", held_out, **score, **options
            )
        )
        charts.append(line_chart(f"Training loss, {pairs}", "weighted sum of a method’s own terms", losses, **options))
    note = (
        "The longest run of the first seed. Where the loss goes on falling and the score does not rise, a run learns "
        "by heart."
    )
    body = f'<div class="charts two">{"".join(charts)}</div>' if any(charts) else ""
    return Section("How they learnt", note, body)


def _runs(models: Models, result: dict[str, Any]) -> Section:
    """What overfits when, and how good the neighbours are."""
    judged = next(iter(result["judged"]))
    own = [line for line in result["lines"] if (line["judged"], line["view"]) == (judged, "pairs seen")]
    matching = any(point.get("neighbour_matches") is not None for line in own for point in line["points"])
    rows = []
    for line in own:
        for point in line["points"]:
            matches = point.get("neighbour_matches")
            rows.append(
                [
                    models.named(line["method"]),
                    f"{point['pairs']:,}",
                    f"{point['pairs_seen']:,}",
                    f"{point['seconds']:,.0f}",
                    f"{point['held_out']:.1f}",
                    f"{point['best_at']:.0%}",
                    f"{point['last_of_best']:.0%}",
                    *(["–" if matches is None else f"{matches:.0%}"] if matching else []),
                    str(len(point["by_seed"])) + (f", {point['diverged']} diverged" if point["diverged"] else ""),
                ]
            )
    told = {(line["method"], point["fraction"]) for line in own for point in line["points"]}
    for (name, fraction), lost in lost_runs(result).items():
        if name in models.names and (name, fraction) not in told:
            rows.append(
                [models.named(name), f"{result['pairs'][fraction]:,}", *["–"] * (5 + matching), f"{lost} diverged"]
            )
    head = (
        *("Method", "Pairs", "Pairs seen", "Seconds", "Held-out best", "Reached after", "Left at the end"),
        *(("Neighbours that match",) if matching else ()),
        "Seeds",
    )
    note = "A run that reaches its best score early and has little of it left at the end overfits."
    if matching:
        note += (
            " Neighbours match where the caption that a nearest-neighbour term found is of a pair with a caption in "
            "common."
        )
    return Section("What overfits when", note, _table(head, rows) if rows else "")


def _rates(models: Models, result: dict[str, Any]) -> Section:
    rows = []
    for method in result["methods"]:
        for fraction, scores in method["rates"].items():
            if len(scores) < 2:
                continue
            best = max(scores, key=lambda rate: -math.inf if scores[rate] is None else scores[rate])
            said = ", ".join(
                f"{'<strong>' * (rate == best)}×{float(rate):g}: {_score(score)}{'</strong>' * (rate == best)}"
                for rate, score in sorted(scores.items(), key=lambda item: float(item[0]))
            )
            rows.append([models.named(method["name"]), f"{result['pairs'][fraction]:,}", said])
    note = "Best held-out score at multiples of the recipe’s learning rates; fractions between take a rate between."
    return Section("Learning rates", note, _table(("Method", "Pairs", "Score by rate"), rows) if rows else "")


def _score(score: float | None) -> str:
    return "diverged" if score is None else f"{score:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already, headings are plain."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join("<tr>" + "".join(f'<td class="plain">{cell}</td>' for cell in row) + "</tr>" for row in rows)
    return (
        '<div class="card scroll spaced" tabindex="0" role="region" aria-label="Figures"><table class="alone">'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _facts(prepared: Prepared, result: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("training pairs", ", ".join(result["data"])),
        ("judged on", ", ".join(f"{name} ({items:,} pairs)" for name, items in result["judged"].items())),
        ("fractions", ", ".join(f"{fraction} ({pairs:,})" for fraction, pairs in result["pairs"].items())),
        ("pairs seen", f"{result['pairs_seen']:,} by each run of {result['base']}"),
        ("cells", f"{result['cells']}, {result['seconds'] / 3600:.1f} hours of runs, {prepared.jobs} at a time"),
    ]
    for method in result["methods"]:
        changed = " ".join(method["changes"])
        cost = method["flops_per_pair"] / prepared.flops[result["base"]]
        facts.append(
            (method["name"], f"{method['recipe']} {changed}".strip() + f"; ×{cost:.2f} of the base’s operations a pair")
        )
    facts += [
        ("diverged, not counted", f"{row['method']}, {row['fraction']}, seed {row['seed']}: {row['reason']}")
        for row in result["diverged"]
    ]
    facts += [("note", note) for note in result["notes"]]
    return [*facts, ("declip", result["declip"])]
