"""The page that `declip data inspect` leaves: one self-contained file without scripts.

Captions, keys and paths come from anywhere, so all of them are escaped, and pictures are encoded anew.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from declip.curation.findings import Finding, counted
from declip.data.decode import decode_image
from declip.data.sources import BrokenPair, Source
from declip.evaluation.report.charts import compact
from declip.evaluation.report.parts import cut
from declip.evaluation.report.style import page
from declip.files import write_atomically

SAMPLES = 24
_THUMBNAIL = 180  # pixels

_STYLE = """
.findings { list-style: none; padding: 0 }
.findings > li { display: grid; grid-template-columns: 74px minmax(0, 1fr); gap: 4px 20px; padding: 20px 24px }
.findings > li + li { border-top: 1px solid var(--rule) }
.findings p { overflow-wrap: anywhere; text-wrap: pretty }
.findings .advice, .findings details { color: var(--soft); font-size: 15px; margin-top: 4px }
.findings summary { cursor: pointer }
.findings details ul { padding-left: 20px; font-size: 13.5px; overflow-wrap: anywhere }
.badge { font-size: 13px; font-weight: 650; color: var(--c); border: 1px solid var(--c); border-radius: 99px;
         text-align: center; height: 26px; line-height: 24px; align-self: start }
.act { --c: var(--c1) } .look { --c: var(--c4) } .fine { --c: var(--c2) }
.bins { display: grid; grid-template-columns: max-content minmax(0, 1fr) max-content; gap: 6px 12px;
        font-size: 13.5px; align-items: center }
.bins span { max-width: 140px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.bins .bar { margin: 0; height: 12px; border-radius: 3px }
.bins .bar i { border-radius: 3px }
.bins b { font-weight: 400; color: var(--soft); text-align: right }
.chart.plain { justify-content: flex-start }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 22px 18px; padding: 24px }
.sheet.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)) }
.sheet figure { font-size: 13px; line-height: 1.4; min-width: 0 }
.sheet .row { display: grid; grid-template-columns: 1fr 1fr; gap: 8px }
.sheet img, .sheet .gone { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 8px;
                           background: var(--tint) }
.sheet figcaption { margin-top: 8px; color: var(--soft); overflow-wrap: anywhere }
td.text { white-space: normal; overflow-wrap: anywhere }
tr > .text { text-align: left } td.count { width: 120px }
"""


def write_inspection(
    path: Path, result: dict[str, Any], findings: Sequence[Finding], source: Source, test: Source | None, whole: Any
) -> None:
    """Write the page in one move.

    result: as `inspect` returns it; findings: the same with what to show; whole: indices of the pairs that samples are
    drawn from. Raises OSError where the file cannot be written.
    """
    sections = [
        _findings(findings),
        _histograms(result["histograms"]),
        _sheets(findings, source, test),
        _repeated(result["repeated_captions"]),
        _samples(source, whole),
    ]
    html = _page(result, findings, "\n".join(filter(None, sections)))
    write_atomically(path, lambda temporary: temporary.write_text(html, encoding="utf-8", errors="replace"))


def _page(result: dict[str, Any], findings: Sequence[Finding], body: str) -> str:
    names = " + ".join(result["data"])
    tested = f", held against {' + '.join(result['test'])}" if result["test"] else ""
    counts = result["counts"]
    act, look = (sum(finding.severity == severity for finding in findings) for severity in ("act", "look"))
    headline = (
        f"{counted(act, 'thing')} to act on, {look} to look at"
        if act
        else f"Nothing to act on, {counted(look, 'thing')} to look at"
        if look
        else "Nothing wrong was found"
    )
    facts = [
        ("Pairs", f"{counts['pairs']:,}"),
        ("Images that can be read", f"{counts['images']:,}"),
        ("Captions", f"{counts['captions']:,}, {counts['different_captions']:,} of them different"),
        ("Labels", f"{counts['labels']:,}" if counts["labels"] else "none"),
        ("Images, encoded", _size(counts["image_bytes"])),
    ]
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    header = f"""<p class="eyebrow" style="overflow-wrap: anywhere">{escape(names)}{escape(tested)}</p>
<h1>{headline}</h1>
<dl class="card">{listed}</dl>"""
    return page(names, header, body, _STYLE)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _findings(findings: Sequence[Finding]) -> str:
    items = []
    for finding in findings:
        if finding.severity == "fine":
            continue
        advice = f'<p class="advice">{_code(finding.advice)}</p>' if finding.advice else ""
        places = "".join(f"<li>{escape(cut(example))}</li>" for example in finding.examples)
        first = f"<details><summary>The first places</summary><ul>{places}</ul></details>" if places else ""
        items.append(
            f'<li><span class="badge {finding.severity}">{finding.severity}</span>'
            f"<div><p>{escape(finding.says)}</p>{advice}{first}</div></li>"
        )
    if fine := " ".join(escape(finding.says) for finding in findings if finding.severity == "fine"):
        items.append(f'<li><span class="badge fine">fine</span><div><p>{fine}</p></div></li>')
    return f'<section><h2>Findings</h2><ul class="card findings spaced">{"".join(items)}</ul></section>'


def _code(text: str) -> str:
    """Plain text with what stands between backticks set off."""
    parts = escape(text).split("`")
    return "".join(f"<b>{part}</b>" if number % 2 else part for number, part in enumerate(parts))


def _histograms(histograms: dict[str, dict[str, Any]]) -> str:
    drawn = []
    for number, histogram in enumerate(histograms.values()):
        most = max(count for _, count in histogram["bins"]) or 1
        bins = "".join(
            f'<span title="{escape(str(label))}">{escape(str(label))}</span><div class="bar"><i style="width: '
            f'{100 * count / most:.1f}%"></i></div><b>{compact(count)}</b>'
            for label, count in histogram["bins"]
        )
        drawn.append(
            f'<figure class="chart plain c{number % 2 * 2}"><figcaption><strong>{escape(histogram["title"])}</strong>'
            f'<span>{escape(histogram["note"])}</span></figcaption><div class="bins">{bins}</div></figure>'
        )
    return f'<section><h2>What there is</h2><div class="charts spaced">{"".join(drawn)}</div></section>'


def _sheets(findings: Sequence[Finding], source: Source, test: Source | None) -> str:
    parts = []
    for finding in findings:
        if not finding.shown:
            continue
        other = test if finding.shown_in == "test" and test is not None else source
        figures = []
        for shown in finding.shown:
            places = [source, other][: len(shown)]
            looks = "".join(_picture(part, index) for part, index in zip(places, shown, strict=True))
            below = " — ".join(cut(_text(part, index), 70) for part, index in zip(places, shown, strict=True))
            box = f'<div class="row">{looks}</div>' if len(shown) > 1 else looks
            figures.append(f"<figure>{box}<figcaption>{escape(below)}</figcaption></figure>")
        wide = " wide" if len(finding.shown[0]) > 1 else ""
        parts.append(f'<h3>{escape(finding.says)}</h3><div class="card sheet{wide}">{"".join(figures)}</div>')
    return f"<section><h2>Seen side by side</h2>{''.join(parts)}</section>" if parts else ""


def _repeated(captions: Sequence[dict[str, Any]]) -> str:
    if not captions:
        return ""
    rows = "".join(
        f'<tr><td class="text">{escape(cut(row["caption"]))}</td><td class="plain count">{row["pairs"]:,}</td></tr>'
        for row in captions
    )
    return (
        '<section><h2>Most repeated captions</h2><div class="card spaced"><table><thead><tr>'
        f'<th class="text">Caption</th><th>Pairs</th></tr></thead><tbody>{rows}</tbody></table></div></section>'
    )


def _samples(source: Source, whole: Any) -> str:
    if not len(whole):
        return ""
    drawn = np.random.default_rng(0).choice(whole, min(SAMPLES, len(whole)), replace=False)
    figures = "".join(
        f"<figure>{_picture(source, index)}<figcaption>{escape(cut(_text(source, index)))}</figcaption></figure>"
        for index in drawn.tolist()
    )
    return f'<section><h2>Drawn at random</h2><div class="card sheet spaced">{figures}</div></section>'


def _text(source: Source, index: int) -> str:
    captions = source.captions(index)
    return captions[0] if captions else source.key(index)


def _picture(source: Source, index: int) -> str:
    """A small JPEG in the page; an empty box where the image cannot be read."""
    try:
        image = Image.fromarray(decode_image(source[index].image))
    except (BrokenPair, ValueError):
        return '<div class="gone"></div>'
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    place = escape(source.where(index), quote=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{place}" title="{place}" src="data:image/jpeg;base64,{data}">'
