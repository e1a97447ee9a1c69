"""What lies behind the figures: the shape of the embeddings, training pictures among the test's, broken images."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from declip.evaluation.details import Details, Overlap
from declip.evaluation.judged import Judged
from declip.evaluation.report.judgements import Models, Section, grouped, subheading, table
from declip.evaluation.report.parts import cut, words

_BROKEN = 5
_PLACES = 5
_HEALTH = (  # what a measure's name has in it, what it means, which direction is good; the first that fits
    ("alignment", "Mean squared distance of an image and its caption.", "lower is better"),
    ("uniformity", "How evenly embeddings fill the sphere.", "lower is better"),
    ("gap", "Distance between the centres of images and captions.", "lower is mostly better"),
    ("rank", "Directions that embeddings really use; few: they have collapsed.", "higher is better"),
    ("unmatched", "Cosine of an image and somebody else's caption.", "lower is better"),
    ("negative", "Cosine of an image and somebody else's caption.", "lower is better"),
    ("random", "Cosine of an image and somebody else's caption.", "lower is better"),
    ("matched", "Cosine of an image and its own caption.", "higher is better"),
    ("positive", "Cosine of an image and its own caption.", "higher is better"),
    ("margin", "Cosine of matched pairs less that of others.", "higher is better"),
    ("cosine", "Cosine of embeddings.", ""),
)


def health(models: Models, details: Sequence[Details]) -> Section:
    """A table a set: a row a measure, a column a model."""
    parts = []
    judged = grouped((each for each in details if each.health), lambda each: (each.data, each.task))
    for (data, task), own in judged.items():
        heads = ("Measure", *(models.named(each.model) for each in own))
        rows = []
        for measure in dict.fromkeys(measure for each in own for measure in each.health):
            values = [_number(each.health[measure]) if measure in each.health else "–" for each in own]
            cells = "".join(f'<td class="plain">{value}</td>' for value in values)
            name = escape(words(measure).capitalize())
            rows.append(f'<tr><th scope="row">{name}{_meaning(measure)}</th>{cells}</tr>')
        measures = table("Embeddings", heads, rows)
        parts.append(f'<div class="block">{subheading(data, task)}{measures}</div>')
    note = "How the embeddings lie on the sphere. These explain figures; they are no figures to be won."
    return Section("Embeddings", note, "".join(parts))


def _meaning(measure: str) -> str:
    for part, meaning, direction in _HEALTH:
        if part in measure:
            said = f"{meaning} {direction.capitalize()}." if direction else meaning
            return f"<small>{escape(said)}</small>"
    return ""


def _number(value: float) -> str:
    return (f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}").replace("-", "−")


# --- leaks and breakage -----------------------------------------------------------------------------------------------


def leaks(models: Models, overlaps: Sequence[Overlap]) -> Section:
    items = "".join(_leak(models, overlap) for overlap in overlaps)
    note = "Whether images of the sets are among those that the models were trained on, where these are known."
    return Section("Leak check", note, f'<ul class="card checks">{items}</ul>' if items else "")


def leaked(overlap: Overlap) -> int:
    return overlap.exact + overlap.near if overlap.checked else 0


def _leak(models: Models, overlap: Overlap) -> str:
    name, data = models.named(overlap.model), f"<b>{escape(overlap.data)}</b>"
    if not overlap.checked:
        why = f": {escape(overlap.reason)}" if overlap.reason else ""
        return f'<li class="unknown"><p>{name}, {data}: not checked{why}.</p></li>'
    images = f"{overlap.items:,} images of {data}"
    if not leaked(overlap):
        return f'<li class="clean"><p>None of the {images} is among the training images of {name}.</p></li>'
    kinds = [f"{overlap.exact:,} exactly"] * bool(overlap.exact) + [f"{overlap.near:,} nearly"] * bool(overlap.near)
    share = 100 * leaked(overlap) / overlap.items if overlap.items else 0.0
    places = escape(", ".join(cut(example, 80) for example in overlap.examples[:_PLACES]))
    first = f'<p class="places">The first: {places}</p>' if places else ""
    return (
        f'<li class="leak"><p>{leaked(overlap):,} of the {images} ({share:.1f}&nbsp;%) also are among the training'
        f" images of {name}, {' and '.join(kinds)}: its figures there may flatter it.</p>{first}</li>"
    )


def broken(results: Sequence[Judged]) -> Section:
    """The first few places of each set, said once for all its models and tasks."""
    parts = []
    for data, own in grouped((judged for judged in results if judged.broken), lambda judged: judged.data).items():
        places = list(dict.fromkeys(where for judged in own for where in judged.broken))
        count = max(len(places), *(judged.undecodable for judged in own))
        listed = "".join(f"<li>{escape(cut(where, 200))}</li>" for where in places[:_BROKEN])
        rest = f"<p>and {count - _BROKEN:,} more</p>" if count > _BROKEN else ""
        images = "1 image" if count == 1 else f"{count:,} images"
        parts.append(
            f'<li class="unknown"><p><b>{escape(data)}</b>: {images} could not be read.</p>'
            f'<ul class="places">{listed}</ul>{rest}</li>'
        )
    note = "What asks for them counts as answered wrongly, so that no model gains by what it cannot read."
    return Section("Broken images", note, f'<ul class="card checks">{"".join(parts)}</ul>' if parts else "")
