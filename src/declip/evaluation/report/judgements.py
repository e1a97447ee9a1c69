"""What the sections of an evaluation report have in common: order, names in their colours, words for figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeVar

from declip.evaluation.judged import Judged, metric_name
from declip.evaluation.report.charts import colour_class
from declip.evaluation.report.parts import DIRECTIONS, RETRIEVAL, data_uri, words

_INLINE_BYTES, _THUMBNAIL = 8_000, 160  # a page has hundreds of pictures, each about 100 pixels wide

T = TypeVar("T")
K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page, HTML but for its title; without a body it is left out."""

    title: str
    note: str
    body: str

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")

    def html(self) -> str:
        note = f'<p class="note">{self.note}</p>' if self.note else ""
        return f'<section id="{self.anchor}"><h2>{self.title}</h2>{note}{self.body}</section>'


@dataclass(frozen=True, slots=True)
class Models:
    """The models of a page in their order, which gives each its colour."""

    names: tuple[str, ...]

    def colour(self, name: str) -> str:
        return colour_class(self.names.index(name))

    def named(self, name: str) -> str:
        """The name in its colour."""
        return f'<span class="name {self.colour(name)}">{escape(name)}</span>'

    def legend(self, names: Iterable[str]) -> str:
        """Whose colours are which; of one model on a page, nothing."""
        shown = list(names)
        return f'<span class="legend">{"".join(map(self.named, shown))}</span>' if len(self.names) > 1 else ""


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by what `key` says of them, in order of first appearance."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def place(judged: Judged) -> tuple[str, str, object]:
    """What a figure is of: models judged on the same place stand beside each other."""
    return judged.task, judged.data, judged.settings.get("shots")


def lower_is_better(metric: str) -> bool:
    return metric.endswith("_rank")


def main_metric(results: Sequence[Judged]) -> str | None:
    """The one that a task is known by: recall at 1 from caption to picture, accuracy, or else its first."""
    names = list(dict.fromkeys(name for judged in results for name in judged.metrics))
    return next((name for name in ("text_to_image_r1", "top1") if name in names), names[0] if names else None)


def chance(p: float) -> str:
    """``p = 0.031``, as HTML."""
    return "p&nbsp;&lt;&nbsp;0.001" if p < 0.001 else f"p&nbsp;=&nbsp;{p:.2g}"


def signed(number: float) -> str:
    return f"{number:+.1f}".replace("-", "−")


def split_metric(metric: str) -> tuple[str, str]:
    """The direction of retrieval, if any, and the rest: (``Caption → picture``, ``R@5``), (``""``, ``top-1``)."""
    for way, direction in DIRECTIONS.items():
        if metric.startswith(f"{way}_"):
            recall = RETRIEVAL.fullmatch(metric)
            return direction, f"R@{recall[2]}" if recall else words(metric.removeprefix(way))
    return "", metric_name(metric)


def named_metric(metric: str) -> str:
    """As it stands in a sentence: ``caption → picture R@5``, ``top-1``."""
    direction, rest = split_metric(metric)
    return f"{direction.lower()} {rest}".strip()


def subheading(data: str, task: str, legend: str = "") -> str:
    return f"<h3>{escape(data)} <small>{escape(task)}</small>{legend}</h3>"


def table(label: str, heads: Iterable[str], rows: Iterable[str]) -> str:
    """A card with a table; heads are HTML, rows whole; the label is for those who hear the page."""
    head = "".join(f'<th scope="col">{title}</th>' for title in heads)
    return (
        f'<div class="card scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table class="figures">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def source_numbers(found: Iterable[str], sources: Sequence[str]) -> str:
    """The numbers of the footnotes that name these sources."""
    return " ".join(str(number) for number in sorted({sources.index(source) + 1 for source in found}))


def picture(image: bytes, said: str) -> str:
    """A thumbnail, or an empty box where the image cannot be read; `said` is plain text."""
    uri = data_uri(image, _INLINE_BYTES, _THUMBNAIL)
    said = escape(said)
    return f'<img src="{uri}" alt="{said}">' if uri else f'<span class="gone" role="img" aria-label="{said}"></span>'
