"""The shell and style sheet of every ``report.html``: system fonts, one accent per model, a light and a dark page.

The six model colours are told apart with every common colour blindness and have a contrast of at least 4.5:1 with
their page, since names are set in them. Names stand beside the lines, so colour is never the only sign.
"""

from __future__ import annotations

from html import escape

CSS = """
:root {
  color-scheme: light dark;
  --page: #f8f8f6; --card: #ffffff; --ink: #1a1d21; --soft: #5f666e; --rule: #e4e4df; --tint: #f1f1ed;
  --right: #178a48;
  --c0: #1b6bb3; --c1: #bf4a0a; --c2: #0b7d6f; --c3: #a83279; --c4: #826300; --c5: #556575;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111316; --card: #191c20; --ink: #e9ebee; --soft: #9ba3ac; --rule: #2c3036; --tint: #22262b;
    --right: #43cf80;
    --c0: #68b3f7; --c1: #ff9c61; --c2: #43c9b3; --c3: #f093c8; --c4: #d9b84f; --c5: #a9b7c5;
  }
}
.c0 { --c: var(--c0) } .c1 { --c: var(--c1) } .c2 { --c: var(--c2) }
.c3 { --c: var(--c3) } .c4 { --c: var(--c4) } .c5 { --c: var(--c5) }
* { box-sizing: border-box; margin: 0 }
html { -webkit-text-size-adjust: 100% }
body {
  background: var(--page); color: var(--ink); padding: 72px 32px 96px;
  font: 16px/1.55 Inter, ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
  font-variant-numeric: tabular-nums; text-rendering: optimizeLegibility;
}
main, header { max-width: 1080px; margin: 0 auto }
.eyebrow { color: var(--soft); font-size: 14px; font-weight: 600; letter-spacing: .01em }
h1 { font-size: clamp(26px, 3.6vw, 40px); line-height: 1.22; letter-spacing: -.022em; font-weight: 650;
     font-variant-numeric: proportional-nums; margin: 14px 0 22px; max-width: 25em; text-wrap: balance }
h1 b { color: var(--c); font-weight: inherit; white-space: nowrap }
.intro { color: var(--soft); font-size: 18px; max-width: 42em; text-wrap: pretty }
section { margin-top: 72px }
h2 { font-size: 22px; letter-spacing: -.012em; line-height: 1.3; font-weight: 650 }
h3 { font-size: 15px; font-weight: 600; margin: 36px 0 14px }
.note { color: var(--soft); margin: 6px 0 22px; max-width: 46em; text-wrap: pretty }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 14px }
.spaced { margin-top: 22px }
.name, tbody th.name { color: var(--c); font-weight: 600 }

.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 15px }
th, td { padding: 14px 18px; text-align: right; white-space: nowrap; font-weight: 400; vertical-align: top }
th:first-child, td:first-child { text-align: left; padding-left: 24px }
th:last-child, td:last-child { padding-right: 24px }
thead th { color: var(--soft); font-size: 13px; padding-bottom: 4px; padding-top: 4px }
thead tr:first-child th { padding-top: 16px }
thead tr:last-child th { padding-bottom: 12px; border-bottom: 1px solid var(--rule) }
thead .group { text-align: left; color: var(--ink); font-weight: 600 }
tbody tr + tr > * { border-top: 1px solid var(--rule) }
th.start, td.start { border-left: 1px solid var(--rule) }
td .value { display: block; min-width: 56px }
td strong { font-weight: 700 }
td:not(.best) .value { color: var(--soft) }
table.alone td .value, td.plain { color: var(--ink) }
.bar { display: block; height: 4px; border-radius: 2px; margin-top: 8px; background: var(--tint); overflow: hidden }
.bar i { display: block; height: 100%; background: var(--c); border-radius: 2px }
.difference td, .difference th { color: var(--soft); padding-top: 11px; padding-bottom: 13px }
table + h3, .card + h3 { margin-top: 40px }

.queries { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 20px }
.query { padding: 20px 22px 22px }
.query h3 { margin: 0 0 14px; font-size: 16px; line-height: 1.4 }
.found { display: grid; grid-template-columns: 92px 1fr; gap: 14px; align-items: center }
.found + .found { margin-top: 12px; padding-top: 12px; border-top: 1px solid var(--rule) }
.found .who { font-size: 14px; line-height: 1.35; overflow-wrap: anywhere }
.found .who small { display: block; color: var(--soft); font-size: 13px }
.hits { list-style: none; padding: 0; display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 10px }
.hit { position: relative; aspect-ratio: 1; border-radius: 10px; background: #fff; border: 1px solid var(--rule) }
.hit img, .hit .gone { display: block; width: 100%; height: 100%; object-fit: cover; border-radius: 9px }
.hit .gone { background: var(--tint) }
.wrong img { opacity: .38; filter: grayscale(.75) }
.right { border: 0; outline: 3px solid var(--right); outline-offset: -1px }
.right::after { content: ""; position: absolute; right: -6px; top: -6px; width: 20px; height: 20px; border-radius: 50%;
                background: var(--right); border: 2px solid var(--card) }
.right::before { content: ""; position: absolute; z-index: 1; right: 2px; top: -1px; width: 4px; height: 8px;
                 border: solid var(--card); border-width: 0 2px 2px 0; transform: rotate(42deg) }
.note .count { white-space: nowrap }
.nothing { color: var(--soft); font-size: 14px }

.charts { display: grid; gap: 20px; grid-template-columns: repeat(2, minmax(0, 1fr)) }
.charts.three { grid-template-columns: repeat(3, minmax(0, 1fr)) }
.charts.one { grid-template-columns: minmax(0, 640px) }
.chart { background: var(--card); border: 1px solid var(--rule); border-radius: 14px; padding: 18px 20px 14px;
         display: flex; flex-direction: column; justify-content: space-between }
.chart figcaption { font-size: 15px; line-height: 1.4; margin-bottom: 12px }
.chart strong { font-weight: 600; display: block }
.chart figcaption span { color: var(--soft); font-size: 13.5px }
.chart svg { display: block; width: 100%; height: auto; overflow: visible }
.chart text { font-size: 12px; fill: var(--soft) }
.chart text .name { fill: var(--c) }
.chart path { fill: none; vector-effect: non-scaling-stroke }
.grid { stroke: var(--rule) } .axis { stroke: var(--soft); opacity: .55 }
.line { stroke: var(--c); stroke-width: 2.25; stroke-linejoin: round; stroke-linecap: round }
.raw { stroke: var(--c); stroke-width: 1; opacity: .2 }
.span { stroke: var(--c); stroke-width: 5; opacity: .22; stroke-linecap: round }
.leader { stroke: var(--c); stroke-width: 1; opacity: .45 }
.chart circle { fill: var(--c) }

dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); padding: 10px 24px;
     column-gap: 40px }
dl div { padding: 14px 0 }
dt { color: var(--soft); font-size: 13.5px }
dd { overflow-wrap: anywhere }
.steps { list-style: none; padding: 8px 24px }
.steps li { padding: 16px 0; display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 5fr); gap: 8px 32px;
            align-items: center }
.steps li + li { border-top: 1px solid var(--rule) }
code { font: 14px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
       background: var(--tint); border-radius: 8px; padding: 9px 14px; overflow-x: auto; white-space: pre;
       display: block; user-select: all }

@media (max-width: 900px) {
  .charts, .charts.three { grid-template-columns: minmax(0, 1fr) }
}
@media (max-width: 560px) {
  body { padding: 40px 16px 64px }
  section { margin-top: 52px }
  .query { padding: 16px }
  .found { grid-template-columns: 1fr; gap: 8px }
  .found .who small { display: inline; margin-left: 6px }
  .chart { padding: 16px 12px 12px }
  .charts:not(.three) text { font-size: 14px }
  .steps li { grid-template-columns: minmax(0, 1fr) }
  th, td { padding-left: 12px; padding-right: 12px }
}
@media print {
  body { padding: 0 } section { margin-top: 36px }
  .query, .chart, tr { break-inside: avoid }
}
"""


def page(title: str, header: str, body: str, style: str = "") -> str:
    """A whole page that needs no network and may load none. All but `title` is HTML and CSS already."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{CSS}{style}</style>
</head>
<body>
<header>
{header}
</header>
<main>
{body}
</main>
</body>
</html>
"""
