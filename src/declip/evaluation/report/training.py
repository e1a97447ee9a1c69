"""``report.html``: what one or more trained models can do and how they learnt it, as one self-contained page.

Everything is inside the file (style, drawings, pictures as data: URIs) and it has no scripts, so it opens without a
network, can be mailed, and looks the same in ten years.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from declip.evaluation.report.charts import Line, Points, compact, finite_points, line_chart, scientific, thin
from declip.evaluation.report.parts import setup, words
from declip.evaluation.report.style import page
from declip.evaluation.report.training_sections import (
    Hit,
    ModelResult,
    Query,
    colour,
    duration,
    headline,
    pictures,
    results,
)
from declip.files import write_atomically

__all__ = ["Hit", "ModelResult", "Query", "write_report"]

_TERMS = {  # in the order of the charts: title, and what the term asks of the model
    "contrastive": ("Contrastive", "match every picture with its caption"),
    "sigmoid": ("Sigmoid", "say of every picture and caption whether they belong together"),
    "simsiam": ("SimSiam", "two views of a picture predict each other"),
    "simclr": ("SimCLR", "find the other view of the same picture"),
    "masked_language": ("Masked language", "predict the hidden words of a caption"),
    "nearest_neighbour": ("Nearest neighbour", "match pictures with captions of similar pairs"),
    "token_wise": ("Token-wise", "match patches with words"),
}
_SCORE: dict[str, Any] = {"noisy": False, "from_zero": True, "number": "{:.1f}".format, "unit": "%"}
_SPEED: dict[str, Any] = {"from_zero": True, "number": compact}
_RATE: dict[str, Any] = {"noisy": False, "from_zero": True, "number": scientific}
_ROWS = 20_000  # of a history that has more, so many, evenly spaced, are looked at
_Chart = tuple[str, str, list[Line], dict[str, Any]]  # title, note, lines, options of line_chart


def write_report(
    path: str | Path,
    title: str,
    intro: str,
    models: Sequence[ModelResult],
    queries: Sequence[Query],
    facts: Sequence[tuple[str, str]],
    commands: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the page to ``path`` in one move: a reader never sees half of it.

    ``facts`` are (name, value) pairs about data, towers and recipe; ``commands`` are (what it does, command line)
    pairs that say how to go on. All texts are plain text. Raises ValueError without a model, OSError where the file
    cannot be written.
    """
    if not models:
        raise ValueError("A report needs at least one model.")
    html = _page(title, intro, models, queries, facts, commands)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(html, encoding="utf-8"), several=True)


def _page(
    title: str,
    intro: str,
    models: Sequence[ModelResult],
    queries: Sequence[Query],
    facts: Sequence[tuple[str, str]],
    commands: Sequence[tuple[str, str]],
) -> str:
    sections = [results(models), pictures(models, queries), _training(models), _cost(models), setup(facts)]
    body = "\n".join(filter(None, [*sections, _commands(commands)]))
    header = f"""<p class="eyebrow">{escape(title)}</p>
<h1>{headline(models)}</h1>
<p class="intro">{escape(intro)}</p>"""
    return page(title, header, body)


def _training(models: Sequence[ModelResult]) -> str:
    """Charts over pairs seen: the loss term by term, then held-out score, speed and learning rate."""
    x_max = max((x for model in models for x, _ in _points(model, "pairs")), default=0.0)
    if not x_max:
        return ""
    found = list(dict.fromkeys(term for model in models for row in model.history for term in row.get("terms") or {}))
    terms = [term for term in _TERMS if term in found] + [term for term in found if term not in _TERMS]
    losses: list[_Chart] = [
        (*_TERMS.get(term, (words(term).capitalize(), "")), _lines(models, "terms", term), {}) for term in terms
    ] or [("Loss", "weighted sum of all terms", _lines(models, "loss"), {})]
    progress: list[_Chart] = [
        ("Held-out score", "percent, on pairs held out of training", _held_out(models), _SCORE),
        ("Speed", "training pairs a second", _lines(models, "samples_per_second"), _SPEED),
        ("Learning rate", "as scheduled", _lines(models, "lr"), _RATE),
    ]
    they = "it" if len(models) == 1 else "they"
    note = (
        "Thick lines are smoothed, thin ones show every logged step. The losses are the terms' own, before weighting."
    )
    body = _charts("Loss, term by term", losses, x_max) + _charts("Score and speed", progress, x_max)
    return f'<section><h2>How {they} learnt</h2><p class="note">{note}</p>{body}</section>' if body else ""


def _charts(title: str, charts: Sequence[_Chart], x_max: float) -> str:
    """A row of charts, or rows of two or three; those without a single point are left out."""
    charts = [chart for chart in charts if any(line.points for line in chart[2])]
    if not charts:
        return ""
    columns, width = ("three", 350) if len(charts) % 3 == 0 else ("one", 600) if len(charts) == 1 else ("two", 500)
    drawn = (line_chart(*chart[:3], x_max=x_max, width=width, **chart[3]) for chart in charts)
    return f'<h3>{title}</h3><div class="charts {columns}">{"".join(drawn)}</div>'


def _lines(models: Sequence[ModelResult], *path: str) -> list[Line]:
    return [Line(model.name, number, _points(model, *path)) for number, model in enumerate(models)]


def _held_out(models: Sequence[ModelResult]) -> list[Line]:
    scores = _lines(models, "held_out", "score")
    return scores if any(line.points for line in scores) else _lines(models, "held_out", "text_to_image_r1")


def _points(model: ModelResult, *path: str) -> Points:
    """(pairs seen, value) of the rows that have a finite value under the nested keys, in order of pairs seen."""
    rows = [(row.get("pairs"), value) for row in model.history if (value := _under(row, path)) is not None]
    return sorted(finite_points(thin(rows, _ROWS)), key=lambda point: point[0])


def _under(row: Mapping[str, Any], path: Sequence[str]) -> object:
    value: object = row
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _cost(models: Sequence[ModelResult]) -> str:
    """What each model took: pairs, time, speed, memory. Zero or unknown is shown as a dash."""
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("Model", "Pairs seen", "Training time", "Pairs a second", "Peak memory")
    )
    rows = []
    for model in models:
        memory = model.peak_memory_gb
        cells = [
            f"{model.pairs_seen:,}",
            duration(model.seconds) if model.seconds > 0 else "–",
            f"{model.pairs_per_second:,.0f}" if model.pairs_per_second > 0 else "–",
            f"{memory:.{2 if memory < 10 else 1}f} GB" if memory > 0 else "–",
        ]
        name = f'<th scope="row" class="name">{escape(model.name)}</th>'
        plain = "".join(f'<td class="plain">{cell}</td>' for cell in cells)
        rows.append(f'<tr class="{colour(models, model)}">{name}{plain}</tr>')
    return (
        '<section><h2>What it took</h2><div class="card scroll spaced" tabindex="0" role="region" aria-label="Cost">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _commands(commands: Sequence[tuple[str, str]]) -> str:
    if not commands:
        return ""
    items = "".join(
        f"<li><span>{escape(purpose)}</span><code>{escape(command)}</code></li>" for purpose, command in commands
    )
    return f'<section><h2>Go on from here</h2><ol class="card steps spaced">{items}</ol></section>'
