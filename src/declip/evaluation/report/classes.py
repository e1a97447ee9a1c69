"""A classification seen closer: each class, what is taken for what, and the pictures of both ends."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import fmean

from declip.evaluation.details import Confusion, Details, Example
from declip.evaluation.report.judgements import Models, Section, grouped, picture, subheading
from declip.evaluation.report.parts import cut

_ALL_CLASSES = 30  # more than so many are not all shown
_ENDS = 12  # but so many of the best and of the worst
_CONFUSIONS = 10
_EXAMPLES = 8
_NAME = 60  # characters of a class's name


def classes(models: Models, details: Sequence[Details]) -> Section:
    parts = []
    for (data, task), own in grouped(details, lambda each: (each.data, each.task)).items():
        body = _accuracies(models, own) + _confusions(models, own)
        body += _pictures(models, own, "Most confident mistakes", "worst")
        body += _pictures(models, own, "Most confident right answers", "best")
        if body:
            parts.append(
                f'<div class="block">{subheading(data, task, models.legend(each.model for each in own))}{body}</div>'
            )
    note = "Which classes a model knows, what it takes for what, and the pictures it was surest of."
    return Section("Class by class", note, "".join(parts))


# --- accuracy of each class -------------------------------------------------------------------------------------------


def _accuracies(models: Models, details: Sequence[Details]) -> str:
    """Bars of all classes, best first; of many, of both ends."""
    scores = {each.model: {score.name: score for score in each.classes} for each in details if each.classes}
    items = {score.name: score.items for own in scores.values() for score in own.values()}
    if not items:
        return ""
    order = sorted(items, key=lambda name: -fmean(own[name].accuracy for own in scores.values() if name in own))

    def rows(names: Sequence[str]) -> str:
        return "".join(
            _class_row(models, name, items[name], {m: own[name].accuracy for m, own in scores.items() if name in own})
            for name in names
        )

    if len(order) <= _ALL_CLASSES:
        title = "Accuracy of each class, in percent"
        return f'<div class="card classes"><h4>{title}</h4><div class="columns">{rows(order)}</div></div>'
    ends = ((f"The {_ENDS} best of {len(order):,} classes", order[:_ENDS]), (f"The {_ENDS} worst", order[-_ENDS:]))
    cards = (f'<div class="card classes"><h4>{title}, in percent</h4>{rows(names)}</div>' for title, names in ends)
    return f'<div class="pair">{"".join(cards)}</div>'


def _class_row(models: Models, name: str, items: int, accuracies: dict[str, float]) -> str:
    bars = "".join(
        f'<span class="{models.colour(model)}" title="{escape(model)}"><span class="bar"><i style="width:{value:.1f}%">'
        f"</i></span><b>{value:.0f}</b></span>"
        for model, value in accuracies.items()
    )
    said = f"{name}: {items:,} {'image' if items == 1 else 'images'}"
    return f'<div class="class"><p title="{escape(said)}">{escape(cut(name, _NAME))}</p><div>{bars}</div></div>'


# --- what is taken for what -------------------------------------------------------------------------------------------


def _confusions(models: Models, details: Sequence[Details]) -> str:
    cards = []
    for each in details:
        if each.confusions:
            rows = "".join(map(_confusion, each.confusions[:_CONFUSIONS]))
            title = f"<h4>Most frequent mistakes{_by(models, each.model)}</h4>"
            cards.append(f'<div class="card confusions {models.colour(each.model)}">{title}<ol>{rows}</ol></div>')
    return f'<div class="pair">{"".join(cards)}</div>' if cards else ""


def _confusion(confusion: Confusion) -> str:
    truth, taken_for = (escape(cut(name, _NAME)) for name in (confusion.truth, confusion.taken_for))
    share = 100 * confusion.count / confusion.of if confusion.of else 0.0
    return (
        f"<li><p>{truth} <small>taken for</small> {taken_for}"
        f'</p><b>{confusion.count:,} <small>of {confusion.of:,}</small></b><span class="bar" aria-hidden="true">'
        f'<i style="width:{min(share, 100.0):.1f}%"></i></span></li>'
    )


def _by(models: Models, name: str) -> str:
    return f" of {models.named(name)}" if len(models.names) > 1 else ""


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pictures(models: Models, details: Sequence[Details], title: str, which: str) -> str:
    """Of each model its most confident answers, the wrong (``worst``) or the right ones (``best``)."""
    parts = []
    for each in details:
        examples: list[Example] = getattr(each, which)[:_EXAMPLES]
        if examples:
            shown = "".join(map(_example, examples))
            parts.append(f'<h4>{title}{_by(models, each.model)}</h4><div class="examples">{shown}</div>')
    return f'<div class="card sheets">{"".join(parts)}</div>' if parts else ""


def _example(example: Example) -> str:
    sure = f"<small>{100 * example.confidence:.0f}&nbsp;% sure</small>"
    truth, taken_for = (escape(cut(name, _NAME)) for name in (example.truth, example.taken_for))
    if example.truth == example.taken_for:
        said, caption = f"{example.truth}, named right", f"<b>{truth}</b>{sure}"
    else:
        said = f"{example.truth}, taken for {example.taken_for}"
        caption = f"<b>{truth}</b><small>taken for</small> {taken_for}{sure}"
    return f"<figure>{picture(example.image, said)}<figcaption>{caption}</figcaption></figure>"
