"""Small line charts as inline SVG, drawn without a plotting library.

A chart is a string of HTML that needs the page's style sheet (``style.CSS``) and nothing else. Colours are
given as numbers and resolved there, so that one drawing serves the light and the dark page.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeVar

COLOURS = 6  # the style sheet defines .c0 … .c5
MAX_POINTS = 400  # of a drawn line; a screen shows no more
_TOP, _BOTTOM, _LEFT, _HEIGHT = 12, 38, 44, 236
_LABEL_GAP = 15.0
_LONGEST_LABEL = 14  # characters of a name beside its line

Points = list[tuple[float, float]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Line:
    """One model's line: its name, the number of its colour, and (x, y) points in order of x.

    spans: (x, low, high), drawn as upright strokes: how sure the points are
    """

    name: str
    colour: int
    points: Points
    spans: tuple[tuple[float, float, float], ...] = ()


def colour_class(number: int) -> str:
    """The class that paints in a model's colour."""
    return f"c{number % COLOURS}"


def finite_points(pairs: Sequence[tuple[object, object]]) -> Points:
    """The pairs whose x and y are both finite numbers; anything else (None, NaN, text) is left out."""
    return [(float(x), float(y)) for x, y in pairs if _is_finite(x) and _is_finite(y)]  # type: ignore[arg-type]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def compact(number: float) -> str:
    """A count for an axis: 0, 800, 12k, 1.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def scientific(number: float) -> str:
    """A learning rate: 0, 0.02, 5·10⁻⁴."""
    if number == 0 or abs(number) >= 0.01:
        return f"{number:.3g}"
    mantissa, exponent = f"{number:.2e}".split("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa.rstrip('0').rstrip('.')}·10{power}"


def significant(number: float) -> str:
    """A loss: three digits and a true minus sign."""
    text = f"{number:#.3g}".removesuffix(".") if 1e-3 <= abs(number) < 1e3 else compact(number)
    return text.replace("-", "−")


def smooth(points: Points) -> Points:
    """Mean of the neighbours within a sixtieth of the line to each side.

    The window shrinks at the start, where a loss falls too steeply for a mean to be true, and is cut off at the end.
    """
    most = len(points) // 60
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    smoothed = []
    for i, (x, _) in enumerate(points):
        radius = min(most, max(i, most // 4))
        low, high = max(0, i - radius), min(len(points), i + radius + 1)
        smoothed.append((x, (sums[high] - sums[low]) / (high - low)))
    return smoothed


def thin(points: list[T], limit: int = MAX_POINTS) -> list[T]:
    """At most ``limit`` of the points, evenly spaced, the first and the last among them."""
    if len(points) <= limit:
        return points
    return [points[round(i * (len(points) - 1) / (limit - 1))] for i in range(limit)]


def envelope(points: Points, limit: int = MAX_POINTS) -> Points:
    """At most ``limit`` points that keep the spread of a noisy line: the lowest and the highest of each stretch."""
    if len(points) <= limit:
        return points
    count = limit // 2
    edges = [round(i * len(points) / count) for i in range(count + 1)]
    kept: Points = []
    for low, high in itertools.pairwise(edges):
        stretch = range(low, high)
        ends = {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(ends)]
    return kept


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers, ``about`` that many steps, the first at or below ``low`` and the last at or above ``high``."""
    if not high > low:
        low, high = (low - 0.5, high + 0.5) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def line_chart(
    title: str,
    note: str,
    lines: Sequence[Line],
    *,
    x_max: float,
    unit: str = "",
    noisy: bool = True,
    from_zero: bool = False,
    number: Callable[[float], str] = significant,
    width: int = 500,
    x_name: str = "pairs seen",
    x_ticks: Sequence[tuple[float, str]] = (),
    named: bool = True,
) -> str:
    """A figure: title, note, and one line per model over pairs seen (or ``x_name``), each labelled at its end.

    ``noisy`` lines are drawn smoothed over a light line of the raw values; others get a dot per value while they are
    few. ``x_max`` is the end of the x axis, shared by the charts of a page; ``x_ticks`` are (place, text) pairs, by
    default round numbers; not ``named`` are lines whose colours the page explains. A model without points still counts
    for the layout. Returns "" when no line has a point.
    """
    drawn = [(line, smooth(line.points) if noisy else line.points) for line in lines if line.points]
    if not drawn:
        return ""
    ends = [number(points[-1][1]) + unit for _, points in drawn]
    # On a page of one model no line needs its name beside it. Equal room makes the x axes of all charts equal.
    named = named and len(lines) > 1
    labels = [(_short(line.name) if named else "", end) for (line, _), end in zip(drawn, ends, strict=True)]
    longest = max(len(_short(line.name)) for line in lines) + 1 if named else 0
    right = 18 + 6.8 * (longest + max(6, *map(len, ends)))
    y_ticks = _y_ticks(drawn, noisy, from_zero)
    left = max(_LEFT, 14 + 6.2 * max(map(len, tick_labels(y_ticks))))
    x_axis = x_ticks or [(tick, compact(tick)) for tick in ticks(0, x_max or 1.0)]
    frame = _Frame(left, width - right, x_max or 1.0, y_ticks[0], y_ticks[-1])
    parts = [_grid(frame, y_ticks, unit, x_axis, x_name)]
    places = {place: f"at {text} {x_name}" for place, text in x_ticks}
    parts += [_drawing(frame, line, points, noisy, places) for line, points in drawn]
    parts.append(_end_labels(frame, drawn, labels))
    said = "; ".join(f"{line.name} ends at {end}" for (line, _), end in zip(drawn, ends, strict=True))
    description = f"Line chart of {title.lower()} over {x_name}: {said}."
    return (
        f'<figure class="chart"><figcaption><strong>{escape(title)}</strong> <span>{escape(note)}</span></figcaption>'
        f'<svg viewBox="0 0 {width} {_HEIGHT}" role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'
        "</figure>"
    )


@dataclass(frozen=True, slots=True)
class _Frame:
    """The plot's rectangle in the drawing and what its axes span."""

    left: float
    right: float
    x_max: float
    y_min: float
    y_max: float
    top: float = _TOP
    bottom: float = _HEIGHT - _BOTTOM

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * value / self.x_max

    def y(self, value: float) -> float:
        share = (value - self.y_min) / (self.y_max - self.y_min)
        return self.bottom - (self.bottom - self.top) * min(1.0, max(0.0, share))

    def path(self, points: Points) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)


def _y_ticks(drawn: Sequence[tuple[Line, Points]], noisy: bool, from_zero: bool) -> list[float]:
    """The axis spans what is drawn in full, and of the raw values all but the wildest hundredth."""
    shown = [y for _, points in drawn for _, y in points]
    shown += [end for line, _ in drawn for _, *ends in line.spans for end in ends]
    if noisy:
        for line, _ in drawn:
            values = sorted(y for _, y in line.points)
            cut = math.ceil(len(values) / 100) if len(values) > 60 else 0
            shown += values[cut : len(values) - cut]
    low, high = min(shown), max(shown)
    if from_zero and low >= 0:
        low, high = 0.0, high or 1.0
    return ticks(low, high)


def tick_labels(values: Sequence[float]) -> list[str]:
    """The values as texts of one kind: all compact, all scientific, or all with the same number of decimals."""
    largest = max(abs(value) for value in values)
    if largest >= 1000:
        return [compact(value) for value in values]
    if largest < 0.01:
        return [scientific(value) for value in values]
    decimals = next(n for n in range(13) if all(abs(value - round(value, n)) < 1e-9 for value in values))
    return [f"{value:.{decimals}f}".replace("-", "−") for value in values]


def _grid(frame: _Frame, y_ticks: list[float], unit: str, x_ticks: Sequence[tuple[float, str]], x_name: str) -> str:
    parts = []
    for tick, text in zip(y_ticks, tick_labels(y_ticks), strict=True):
        y = frame.y(tick)
        kind = "axis" if tick == y_ticks[0] else "grid"
        parts.append(f'<path class="{kind}" d="M{frame.left:.1f} {y:.1f}H{frame.right:.1f}"/>')
        parts.append(f'<text x="{frame.left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(text + unit)}</text>')
    for tick, text in x_ticks:
        if tick <= frame.x_max * 1.001:
            x = frame.x(tick)
            parts.append(f'<text x="{x:.1f}" y="{frame.bottom + 17:.1f}" text-anchor="middle">{escape(text)}</text>')
    middle = (frame.left + frame.right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_name)}</text>')
    return "".join(parts)


def _drawing(frame: _Frame, line: Line, points: Points, noisy: bool, places: Mapping[float, str]) -> str:
    colour = colour_class(line.colour)
    # A seventh model and its successors share a colour with an earlier one: dashes keep them apart.
    dashes = ' stroke-dasharray="5 4"' if line.colour >= COLOURS else ""
    parts = []
    if noisy and len(points) > 60:
        parts.append(f'<path class="raw {colour}" d="{frame.path(envelope(line.points))}"/>')
    for x, low, high in line.spans:
        parts.append(f'<path class="span {colour}" d="M{frame.x(x):.1f} {frame.y(low):.1f}V{frame.y(high):.1f}"/>')
    kept = thin(points)
    title = f"<title>{escape(line.name)}</title>"
    parts.append(f'<path class="line {colour}" d="{frame.path(kept)}"{dashes}>{title}</path>')
    dots = kept if not noisy and len(kept) <= 30 else kept[-1:]
    for number, (x, y) in enumerate(dots, start=1):
        radius = 3.5 if number == len(dots) else 2.2
        where = places.get(x, f"after {x:,.0f} pairs")
        title = f"<title>{escape(f'{line.name}: {y:.4g} {where}')}</title>"
        parts.append(
            f'<circle class="{colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{radius}">{title}</circle>'
        )
    return "".join(parts)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"


def _end_labels(frame: _Frame, drawn: Sequence[tuple[Line, Points]], labels: Sequence[tuple[str, str]]) -> str:
    """Each line's name and last value at the right of the plot, moved apart where the lines end close together."""
    wanted = [frame.y(points[-1][1]) for _, points in drawn]
    placed = spread(wanted, min(_LABEL_GAP, (frame.bottom - frame.top) / len(wanted)), frame.top, frame.bottom)
    parts = []
    for (line, points), (name, value), y in zip(drawn, labels, placed, strict=True):
        x_end, y_end = frame.x(points[-1][0]), frame.y(points[-1][1])
        colour = colour_class(line.colour)
        if abs(y - y_end) > 2 or frame.right - x_end > 4:
            route = f"M{x_end + 4:.1f} {y_end:.1f}L{frame.right + 8:.1f} {y:.1f}"
            parts.append(f'<path class="leader {colour}" d="{route}"/>')
        named = f'<tspan class="name {colour}">{escape(name)}</tspan> ' if name else ""
        text = f"{named}<tspan>{escape(value)}</tspan>"
        parts.append(f'<text class="end" x="{frame.right + 11:.1f}" y="{y + 4:.1f}">{text}</text>')
    return "".join(parts)


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Move values apart until neighbours are ``gap`` apart, within [low, high] where that has room for all."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    floor = low
    for i in order:
        placed[i] = max(placed[i], floor)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed
