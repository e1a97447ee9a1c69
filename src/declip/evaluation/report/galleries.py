"""What retrieval brought: captions with the pictures found for them, pictures with the captions found."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from declip.evaluation.details import Details, Found
from declip.evaluation.report.judgements import Models, Section, grouped, picture, subheading
from declip.evaluation.report.parts import cut

_HITS = 5
_Asked = tuple[str | bytes, int]  # a query, and the how-manieth of its kind it is: captions repeat


def galleries(models: Models, details: Sequence[Details]) -> Section:
    parts = []
    for (data, task), own in grouped((each for each in details if each.retrieved), lambda d: (d.data, d.task)).items():
        asked = _asked(own)
        texts = "".join(_card(models, query, found) for (query, _), found in asked.items() if isinstance(query, str))
        images = "".join(_card(models, query, found) for (query, _), found in asked.items() if isinstance(query, bytes))
        body = f'<h4>Caption → pictures</h4><div class="queries">{texts}</div>' if texts else ""
        body += f'<h4>Picture → captions</h4><div class="queries">{images}</div>' if images else ""
        parts.append(f'<div class="block">{subheading(data, task)}{body}</div>')
    note = f"The first {_HITS} that each model finds, best first, the right ones marked. The rank is the right one's."
    return Section("What is found", note, "".join(parts))


def _asked(details: Sequence[Details]) -> dict[_Asked, dict[str, Found]]:
    """Each query with what each model found for it, in order of first appearance."""
    asked: dict[_Asked, dict[str, Found]] = {}
    for each in details:
        seen: dict[str | bytes, int] = {}
        for found in each.retrieved:
            seen[found.query] = seen.get(found.query, -1) + 1
            asked.setdefault((found.query, seen[found.query]), {})[each.model] = found
    return asked


def _card(models: Models, query: str | bytes, found: dict[str, Found]) -> str:
    rows = "".join(_found(models, name, found[name]) for name in models.names if name in found)
    if isinstance(query, str):
        return f'<article class="card query"><h5>“{escape(cut(query, 240))}”</h5>{rows}</article>'
    shown = picture(query, "the picture asked about")
    return f'<article class="card query asked"><div class="subject">{shown}</div><div>{rows}</div></article>'


def _found(models: Models, name: str, found: Found) -> str:
    who = f'<p class="who">{models.named(name)}<small>rank {found.rank:,}</small></p>'
    shown = list(zip(found.hits, found.right, strict=False))[:_HITS]
    hits = "".join(_hit(number, hit, right) for number, (hit, right) in enumerate(shown, start=1))
    kind = "texts" if isinstance(found.query, bytes) else "hits"
    return f'<div class="found">{who}<ol class="{kind}">{hits}</ol></div>'


def _hit(number: int, hit: str | bytes, right: bool) -> str:
    verdict = "right" if right else "wrong"
    if isinstance(hit, str):
        said = '<span class="tick" role="img" aria-label="right">✓</span>' if right else ""
        return f'<li class="text {verdict}-text">{said}{escape(cut(hit))}</li>'
    return f'<li class="hit {verdict}">{picture(hit, f"number {number}, {verdict}")}</li>'
