"""The answer of an evaluation in one sentence, and the paired comparisons that it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from declip.evaluation.judged import Comparison, Judged
from declip.evaluation.report.judgements import (
    Models,
    Section,
    chance,
    grouped,
    lower_is_better,
    main_metric,
    named_metric,
    place,
    signed,
)

SIGNIFICANT = 0.05
_NAMED = 2  # so many sets are named in the headline, of more the number is given


def headline(models: Models, results: Sequence[Judged], comparisons: Sequence[Comparison]) -> str:
    """One sentence, as HTML: what the model reaches, or who is ahead of the next on what, and whether by chance."""
    places = _places(results)
    contests = [found for found in places if len(found) > 1]
    if not contests:
        return _reached(models, places)
    if len(contests) == 1:
        return _duel(models, contests[0], comparisons)
    return _tally(models, contests, comparisons)


def _places(results: Sequence[Judged]) -> list[list[Judged]]:
    """Each model's best main figure by task and set, best first; of several numbers of shots, of the last."""
    found = {}
    for (task, data, _), own in grouped(results, place).items():
        metric = main_metric(own)
        rated = [judged for judged in own if metric in judged.metrics]
        if metric and rated:
            best_first = sorted(rated, key=lambda judged: judged.metrics[metric], reverse=not lower_is_better(metric))
            found[task, data] = [same[0] for same in grouped(best_first, lambda judged: judged.model).values()]
    return list(found.values())


def _reached(models: Models, places: Sequence[Sequence[Judged]]) -> str:
    """Of the first model, on its first two tasks."""
    if not places:
        return "Nothing was judged."
    name = places[0][0].model
    own = grouped((found[0] for found in places if found[0].model == name), lambda judged: judged.task)
    said = []
    for judged in list(own.values())[:2]:
        metric = main_metric(judged) or ""
        value = sum(each.metrics[metric] for each in judged) / len(judged)
        where = f" on {escape(judged[0].data)}" if len(judged) == 1 else f" on average over {len(judged)} sets"
        said.append(f"{_does(metric)} {_figure(models, name, metric, value)}{_of(judged[0].task, metric)}{where}")
    return f"{_bold(models, name)} {', and '.join(said)}."


def _duel(models: Models, found: Sequence[Judged], comparisons: Sequence[Comparison]) -> str:
    first, second = found[:2]
    metric = main_metric(found) or ""
    leader, other = (_bold(models, judged.model) for judged in (first, second))
    figure, reference = (_figure(models, judged.model, metric, judged.metrics[metric]) for judged in (first, second))
    figures = f"{_does(metric)} {figure}{_of(first.task, metric)} on {escape(first.data)}, {other} {reference}"
    comparison = _between(first, second, metric, comparisons)
    if comparison is None:
        return f"{leader} {figures}: whether that is more than chance was not tested."
    if comparison.p >= SIGNIFICANT:
        return f"{leader} and {other} cannot be told apart: {leader} {figures} ({chance(comparison.p)})."
    if not _shows(comparison, first.model):
        return f"{leader} {figures}, but where both were asked the same, {other} is ahead ({chance(comparison.p)})."
    gap = f"{abs(comparison.difference):.1f}&nbsp;{_unit(metric)}"
    return f"{leader} is ahead of {other}: it {figures}, a difference of {gap} ({chance(comparison.p)})."


def _tally(models: Models, contests: Sequence[Sequence[Judged]], comparisons: Sequence[Comparison]) -> str:
    """On how many tasks and sets who is ahead of the next; nobody is without a comparison that says so."""
    several_tasks = len({found[0].task for found in contests}) > 1
    ahead: dict[str, list[str]] = {}
    untested: dict[str, list[str]] = {}
    close = []
    for found in contests:
        first, second = found[:2]
        metric = main_metric(found) or ""
        where = f"{first.task} on {first.data}" if several_tasks else first.data
        comparison = _between(first, second, metric, comparisons)
        if comparison is None and first.metrics[metric] != second.metrics[metric]:
            untested.setdefault(first.model, []).append(where)
        elif comparison is None or not _shows(comparison, first.model):
            close.append(where)
        else:
            ahead.setdefault(first.model, []).append(where)
    of_whom = "" if len({judged.model for found in contests for judged in found}) == 2 else " of the next"
    said = []
    for name in sorted({**ahead, **untested}, key=lambda name: -len(ahead.get(name, ()))):
        claims = []
        if name in ahead:
            claims.append(f"is significantly ahead{of_whom} on {_listed(ahead[name])}")
        if name in untested:
            claims.append(f"has the best figure, untested, on {_listed(untested[name])}")
        said.append(f"{_bold(models, name)} {' and '.join(claims)}")
    if close:
        said.append(f"{_listed(close)} {'is' if len(close) == 1 else 'are'} too close to call")
    return f"Of {len(contests)} {'tasks and sets' if several_tasks else 'sets'}, {'; '.join(said)}."


def _listed(where: Sequence[str]) -> str:
    named = f" ({escape(', '.join(where))})" if len(where) <= _NAMED else ""
    return f"{len(where)}{named}"


def _between(first: Judged, second: Judged, metric: str, comparisons: Sequence[Comparison]) -> Comparison | None:
    """None also where two are of the same models, set and metric, as of several numbers of shots."""
    found = [
        comparison
        for comparison in comparisons
        if set(comparison.models) == {first.model, second.model}
        and (comparison.data, comparison.task, comparison.metric) == (first.data, first.task, metric)
    ]
    return found[0] if len(found) == 1 else None


def _shows(comparison: Comparison, model: str) -> bool:
    """Whether the model is the better one of the two by more than chance."""
    return comparison.p < SIGNIFICANT and _higher(comparison) == model


def _higher(comparison: Comparison) -> str | None:
    """Who has the better figure, by chance or not; None of equal ones."""
    if not comparison.difference:
        return None
    return comparison.models[(comparison.difference < 0) != lower_is_better(comparison.metric)]


def _does(metric: str) -> str:
    return {"text_to_image_r1": "puts the right picture first for", "top1": "names"}.get(metric, "reaches")


def _of(task: str, metric: str) -> str:
    named = {"text_to_image_r1": " of captions", "top1": f" of pictures right ({task})"}
    return escape(named.get(metric, f" in {named_metric(metric)} ({task})"))


def _figure(models: Models, name: str, metric: str, value: float) -> str:
    unit = "" if lower_is_better(metric) else "%"
    return f'<b class="{models.colour(name)}">{value:.1f}{unit}</b>'


def _bold(models: Models, name: str) -> str:
    return f'<b class="{models.colour(name)}">{escape(name)}</b>'


def _unit(metric: str) -> str:
    return "ranks" if lower_is_better(metric) else "points"


# --- the comparisons --------------------------------------------------------------------------------------------------


def compared(models: Models, comparisons: Sequence[Comparison]) -> Section:
    note = (
        "Both models answered the same queries, and the same images were drawn again and again for both: the bar is the"
        " 95&nbsp;% interval of the difference. Where it reaches across zero, chance is enough to explain it."
    )
    if len(comparisons) > 1:
        note += f" Of models that are equal, one comparison in {round(1 / SIGNIFICANT)} would look significant."
    parts = []
    for (first, second), own in grouped(comparisons, lambda comparison: comparison.models).items():
        title = f"{models.named(first)} against {models.named(second)}"
        span = max(max(map(abs, (*each.interval, each.difference))) for each in own) or 1.0
        axis = (
            f'<div class="sides"><span></span><span></span><p><span>{models.named(second)} better</span>'
            f"<span>{models.named(first)} better</span></p></div>"
        )
        rows = "".join(_comparison(models, comparison, span) for comparison in own)
        parts.append(f'<h3>{title}</h3><div class="card duels">{axis}{rows}</div>')
    return Section("Paired comparisons", note, "".join(parts))


def _comparison(models: Models, comparison: Comparison, span: float) -> str:
    """One difference in words and as a bar; to the right is always better for the first model."""
    higher = _higher(comparison)
    significant = higher is not None and _shows(comparison, higher)
    gap = f"{abs(comparison.difference):.1f}&nbsp;{_unit(comparison.metric)}"
    colour = models.colour(higher) if higher and significant else "level"
    verdict = f"{models.named(higher)} is {gap} ahead" if higher else "No difference"
    if higher and not significant:
        verdict += ", which may be chance"
    low, high = comparison.interval
    flip = -1 if lower_is_better(comparison.metric) else 1
    left, right = sorted((50 + 48 * flip * low / span, 50 + 48 * flip * high / span))
    dot = 50 + 48 * flip * comparison.difference / span
    bar = (
        f'<div class="whisker {colour}" aria-hidden="true"><i style="left:{left:.1f}%;width:{right - left:.1f}%"></i>'
        f'<b style="left:{dot:.1f}%"></b></div>'
    )
    what = escape(f"{comparison.task}, {named_metric(comparison.metric)}")
    where = f"{escape(comparison.data)} <small>{what}</small>"
    figures = f"{signed(comparison.difference)} ({signed(low)} to {signed(high)}), {chance(comparison.p)}"
    return f'<div class="duel"><p>{where}</p><p>{verdict} <small>{figures}</small></p>{bar}</div>'
