"""The sections of a report that say how good the models are: the answer, the tables, the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from declip.evaluation.report.charts import colour_class
from declip.evaluation.report.parts import DIRECTIONS, RETRIEVAL, data_uri, words

HITS_SHOWN = 5
ABOUT_LEVEL = 1.0  # points; on a few hundred test pairs, less than this is a matter of luck


@dataclass(frozen=True, slots=True)
class ModelResult:
    """A trained model: its test metrics in percent, what it cost, and the rows of its ``metrics.jsonl``."""

    name: str
    metrics: Mapping[str, float]
    pairs_seen: int
    seconds: float
    pairs_per_second: float
    peak_memory_gb: float
    history: Sequence[Mapping[str, Any]] = field(default=())


@dataclass(frozen=True, slots=True)
class Hit:
    """A picture that a model found: encoded image (WebP, PNG, JPEG, GIF), its true caption, whether it is right."""

    image: bytes
    caption: str
    right: bool


@dataclass(frozen=True, slots=True)
class Query:
    """A text and what each model (by name) found for it, best first."""

    text: str
    hits: Mapping[str, Sequence[Hit]]


# --- the answer in one sentence ---------------------------------------------------------------------------------------


def headline(models: Sequence[ModelResult]) -> str:
    """The answer in one sentence, as HTML, computed from the metrics and from nothing else.

    Two or more models: the best DeCLIP is held against the best of the others (without a DeCLIP: the best against
    the second best), by recall at 1 from caption to picture. Whoever is behind is said to be behind.
    """
    key = _headline_metric(models)
    judged = sorted((m for m in models if key in m.metrics), key=lambda m: -m.metrics[key])
    if not judged:
        return f"{_named(models, models[0])} saw {models[0].pairs_seen:,} pairs in {duration(models[0].seconds)}."
    subject = next((m for m in judged if "declip" in m.name.lower()), judged[0])
    others = [m for m in judged if m is not subject and "declip" not in m.name.lower()]
    other = next(iter(others or [m for m in judged if m is not subject]), None)
    first = _named(models, subject)
    score = _figure(models, subject, key)
    if other is None:
        return f"{first} {_does(key)} {score}{_of(key)}, after {subject.pairs_seen:,} pairs."
    second, reference = _named(models, other), _figure(models, other, key)
    gap = subject.metrics[key] - other.metrics[key]
    pairs = f"after the same {subject.pairs_seen:,} pairs"
    if subject.pairs_seen != other.pairs_seen:
        pairs = f"after {subject.pairs_seen:,} pairs against {other.pairs_seen:,}"
    if abs(gap) < ABOUT_LEVEL:
        level = f"{first} and {second} are about level"
        return f"{level}: {first} {_does(key)} {score}{_of(key)}, {second} {reference}, {pairs}."
    if gap < 0:
        return (
            f"{first} is not ahead: it {_does(key)} {score}{_of(key)} and {second} {reference},"
            f" {-gap:.1f}&nbsp;points more, {pairs}."
        )
    caveat = _caveat(subject, other, key)
    return f"{first} {_does(key)} {score}{_of(key)}, {second} {reference}: {gap:.1f}&nbsp;points more, {pairs}{caveat}."


def _headline_metric(models: Sequence[ModelResult]) -> str:
    keys = [key for model in models for key in model.metrics]
    return "text_to_image_r1" if "text_to_image_r1" in keys or not keys else keys[0]


def _does(key: str) -> str:
    return "puts the right picture first for" if key == "text_to_image_r1" else "reaches"


def _of(key: str) -> str:
    return " of captions" if key == "text_to_image_r1" else f" in {escape(words(key))}"


def _caveat(subject: ModelResult, other: ModelResult, key: str) -> str:
    """The other direction, where it goes the other way."""
    back = "image_to_text_r1"
    if key != "text_to_image_r1" or not {back} <= subject.metrics.keys() & other.metrics.keys():
        return ""
    if subject.metrics[back] >= other.metrics[back]:
        return ""
    return f"; from picture to caption it is behind, {subject.metrics[back]:.1f}% to {other.metrics[back]:.1f}%"


def _named(models: Sequence[ModelResult], model: ModelResult) -> str:
    return f'<b class="{colour(models, model)}">{escape(model.name)}</b>'


def _figure(models: Sequence[ModelResult], model: ModelResult, key: str) -> str:
    return f'<b class="{colour(models, model)}">{model.metrics[key]:.1f}%</b>'


def colour(models: Sequence[ModelResult], model: ModelResult) -> str:
    return colour_class(next(i for i, candidate in enumerate(models) if candidate is model))


# --- results ----------------------------------------------------------------------------------------------------------


def results(models: Sequence[ModelResult]) -> str:
    """Tables of all metrics: retrieval first, then retrieval on other sets of pairs, then everything else."""
    tables: dict[str, dict[str, list[tuple[str, str]]]] = {"": {}}
    for key in dict.fromkeys(key for model in models for key in model.metrics):
        if key.endswith("_median_rank"):  # neither in percent nor better where it is larger
            continue
        match = RETRIEVAL.search(key)
        if match:
            rest = words((key[: match.start()] + " " + key[match.end() :]).strip(" _-:/."))
            group, column = DIRECTIONS[match[1]], f"R@{match[2]}"
        else:
            rest, group, column = "Other metrics" if _has_retrieval(models) else "", "", words(key)
        tables.setdefault(rest, {}).setdefault(group, []).append((key, column))
    drawn = [(name, _table(models, groups)) for name, groups in tables.items() if groups]
    if not drawn:
        return ""
    body = "".join((f"<h3>{escape(name[0].upper() + name[1:])}</h3>" if name else "") + table for name, table in drawn)
    note = "In percent, on the test pairs."
    if _has_retrieval(models):
        note += " R@5 is the share of queries that have a right answer among the first five."
    return f'<section><h2>Results</h2><p class="note">{note}</p>{body}</section>'


def _has_retrieval(models: Sequence[ModelResult]) -> bool:
    return any(RETRIEVAL.search(key) for model in models for key in model.metrics)


def _table(models: Sequence[ModelResult], groups: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    keys = [key for columns in groups.values() for key, _ in columns]
    starts = {columns[0][0] for columns in groups.values()}
    head = ""
    if any(groups):
        cells = (f'<th class="group start" scope="colgroup" colspan="{len(c)}">{g}</th>' for g, c in groups.items())
        head = f"<tr><td></td>{''.join(cells)}</tr>"
    titles = [(key, column) for columns in groups.values() for key, column in columns]
    head += '<tr><th scope="col">Model</th>'
    head += "".join(f'<th scope="col"{_start(key, starts)}>{escape(column)}</th>' for key, column in titles) + "</tr>"
    rows = []
    for model in models:
        cells = (_cell(models, model, key, key in starts) for key in keys)
        rows.append(f'<tr class="{colour(models, model)}"><th scope="row" class="name">{escape(model.name)}</th>')
        rows += [*cells, "</tr>"]
    if len(models) == 2:
        rows.append(_difference(models, keys, starts))
    kind = ' class="alone"' if len(models) == 1 else ""
    return (
        f'<div class="card scroll" tabindex="0" role="region" aria-label="Results"><table{kind}>'
        f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _start(key: str, starts: set[str]) -> str:
    return ' class="start"' if key in starts else ""


def _cell(models: Sequence[ModelResult], model: ModelResult, key: str, start: bool) -> str:
    classes = ["start"] if start else []
    if key not in model.metrics:
        return f'<td class="{" ".join(classes)}"><span class="value">–</span></td>'
    text = f"{model.metrics[key]:.1f}"
    if len(models) > 1 and text == f"{max(m.metrics[key] for m in models if key in m.metrics):.1f}":
        classes.append("best")
        text = f"<strong>{text}</strong>"
    share = min(100.0, max(0.0, model.metrics[key]))
    bar = f'<span class="bar" aria-hidden="true"><i style="width:{share:.1f}%"></i></span>'
    return f'<td class="{" ".join(classes)}"><span class="value">{text}</span>{bar}</td>'


def _difference(models: Sequence[ModelResult], keys: Sequence[str], starts: set[str]) -> str:
    """The second model minus the first, or the DeCLIP among the two minus the other."""
    one, two = models
    if "declip" in one.name.lower() and "declip" not in two.name.lower():
        one, two = two, one
    cells = [f'<tr class="difference"><th scope="row">{escape(two.name)} − {escape(one.name)}</th>']
    for key in keys:
        text = "–"
        if key in one.metrics and key in two.metrics:
            text = f"{two.metrics[key] - one.metrics[key]:+.1f}".replace("-", "−")
        cells.append(f"<td{_start(key, starts)}>{text}</td>")
    return "".join(cells) + "</tr>"


# --- pictures ---------------------------------------------------------------------------------------------------------


def pictures(models: Sequence[ModelResult], queries: Sequence[Query]) -> str:
    if not queries:
        return ""
    counts = []
    for model in models:
        shown = [hit for query in queries for hit in query.hits.get(model.name, ())[:HITS_SHOWN]]
        if shown:
            right = sum(hit.right for hit in shown)
            name = f'<span class="name {colour(models, model)}">{escape(model.name)}</span>'
            counts.append(f'<span class="count">{name} {right} of {len(shown)}</span>')
    note = (
        f"The first {HITS_SHOWN} pictures that each model finds for a text, best first, the right ones framed: "
        + ", ".join(counts)
        + "."
    )
    finder = "What it finds" if len(models) == 1 else "What they find"
    answering = [model for model in models if any(query.hits.get(model.name) for query in queries)]
    cards = "".join(_query(models, answering, query) for query in queries)
    return f'<section><h2>{finder}</h2><p class="note">{note}</p><div class="queries">{cards}</div></section>'


def _query(models: Sequence[ModelResult], answering: Sequence[ModelResult], query: Query) -> str:
    """What those find that were asked at all."""
    rows = []
    for model in answering:
        hits = query.hits.get(model.name, ())[:HITS_SHOWN]
        right = f"{sum(hit.right for hit in hits)} of {len(hits)} right" if hits else ""
        found = f'<ol class="hits">{"".join(map(_hit, hits))}</ol>' if hits else '<p class="nothing">nothing asked</p>'
        who = f'<span class="name {colour(models, model)}">{escape(model.name)}</span><small>{right}</small>'
        rows.append(f'<div class="found"><p class="who">{who}</p>{found}</div>')
    return f'<article class="card query"><h3>“{escape(query.text)}”</h3>{"".join(rows)}</article>'


def _hit(hit: Hit) -> str:
    verdict = "right" if hit.right else "wrong"
    said = escape(f"{hit.caption} ({verdict})")
    uri = data_uri(hit.image)
    shown = f'<img src="{uri}" alt="{said}">' if uri else f'<span class="gone" role="img" aria-label="{said}"></span>'
    return f'<li class="hit {verdict}" title="{escape(hit.caption)}">{shown}</li>'


# --- words ------------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """42 s, 4 min 12 s, 1 h 03 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
