"""What the page of an evaluation adds to the style sheet of all reports."""

from __future__ import annotations

STYLE = """
:root { --warn: #b3261e; --warn-tint: #fdf0ee }
@media (prefers-color-scheme: dark) { :root { --warn: #ff8a80; --warn-tint: #33201f } }
h1 { overflow-wrap: anywhere } h1 b { white-space: normal }
h3 small { color: var(--soft); font-weight: 400; margin-left: 4px }
h4 { font-size: 14px; font-weight: 600; margin: 22px 0 12px }
h4 .name, h3 .name { font-weight: inherit }
.legend { font-weight: 400; margin-left: 14px } .legend .name { display: inline-block; margin-right: 12px }
.legend .name::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 3px;
                        background: var(--c); margin-right: 6px }
.note + h3, .note + .block > h3 { margin-top: 0 }
.block + .block { margin-top: 56px }
nav { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 26px }
nav a { color: var(--ink); text-decoration: none; font-size: 14px; line-height: 1; padding: 9px 14px;
        background: var(--card); border: 1px solid var(--rule); border-radius: 99px }
nav a:hover { border-color: var(--soft) }
.warning { border: 1px solid var(--warn); background: var(--warn-tint); border-radius: 10px; padding: 12px 18px;
           margin-top: 22px; overflow-wrap: anywhere; max-width: 46em }
.warning a { color: var(--warn) }

.figures small { display: block; font-weight: 400; font-size: 13px; color: var(--soft); white-space: normal }
.figures th[scope=row] { white-space: normal; overflow-wrap: break-word; min-width: 150px; max-width: 300px }
.figures .set th { text-align: left; font-weight: 600; background: var(--tint); padding-top: 9px; padding-bottom: 9px }
.figures .set small { display: inline; margin-left: 8px }
.figures .set span { position: sticky; left: 24px; white-space: normal }
.figures tbody + tbody { border-top: 1px solid var(--rule) }
.interval { display: block; font-size: 12px; line-height: 1.4; color: var(--soft) }
.figures td .value { color: var(--ink) }
.figures .bar { margin-top: 5px; position: relative }
.bar u { position: absolute; top: 0; height: 100%; background: var(--ink); opacity: .45; min-width: 1px }
.figures tbody th, .figures tbody td { padding-top: 11px; padding-bottom: 11px }
.figures .published th, .figures .published td { font-style: italic; color: var(--soft); padding-top: 3px;
                                                 padding-bottom: 3px; font-size: 14px }
.figures .published td { color: var(--soft) }
.figures .published:last-child > * { padding-bottom: 10px }
tr:not(.published) + .published > * { padding-top: 10px !important }
.published sup { font-style: normal; font-size: 11px; line-height: 1 }
tbody .published + .published > * { border-top-color: transparent }
.overview { margin-bottom: 20px } .overview td { position: relative }
.mark { position: absolute; right: 9px; font-size: 11px; font-style: normal; line-height: 1.4 }
.footnotes { color: var(--soft); font-size: 13px; margin-top: 12px; max-width: 62em; text-wrap: pretty }
.footnotes span { white-space: normal; margin-right: 6px } .footnotes sup { line-height: 1 }

.duels { padding: 8px 24px 14px }
.duel, .sides { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1.15fr) minmax(0, 1.35fr); gap: 4px 28px;
                align-items: center }
.duel { padding: 13px 0; border-top: 1px solid var(--rule) }
.duel p { overflow-wrap: anywhere; line-height: 1.4 }
.duel small { display: block; font-size: 13px; color: var(--soft) }
.sides { font-size: 13px; padding: 8px 0 }
.sides p { display: flex; justify-content: space-between; gap: 16px; color: var(--soft) }
.whisker { position: relative; height: 26px; --c: var(--soft);
           background: linear-gradient(var(--soft), var(--soft)) center / 1px 100% no-repeat }
.whisker.c0 { --c: var(--c0) } .whisker.c1 { --c: var(--c1) } .whisker.c2 { --c: var(--c2) }
.whisker.c3 { --c: var(--c3) } .whisker.c4 { --c: var(--c4) } .whisker.c5 { --c: var(--c5) }
.whisker i { position: absolute; top: 8px; height: 10px; border-radius: 2px; background: var(--c); opacity: .38;
             min-width: 3px }
.whisker b { position: absolute; top: 4px; width: 3px; height: 18px; margin-left: -1.5px; border-radius: 2px;
             background: var(--c) }

.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 20px;
        margin-top: 20px }
.classes, .confusions, .sheets { padding: 4px 24px 20px }
.classes .columns { columns: 2; column-gap: 48px }
.class { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 14px; align-items: center;
         padding: 5px 0; font-size: 14px; line-height: 1.3; break-inside: avoid }
.class p { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.class div > span { display: grid; grid-template-columns: 1fr 26px; gap: 8px; align-items: center }
.class .bar { margin: 0; height: 7px; border-radius: 4px }
.class b { font-weight: 400; font-size: 12px; text-align: right; color: var(--soft); line-height: 14px }
.confusions ol { list-style: none; padding: 0 }
.confusions li { display: grid; grid-template-columns: minmax(0, 1fr) max-content; gap: 3px 16px; padding: 6px 0;
                 font-size: 14px; line-height: 1.35 }
.confusions p { overflow-wrap: anywhere } .confusions small { color: var(--soft); font-size: 13px }
.confusions b { font-weight: 600 } .confusions b small { font-weight: 400 }
.confusions .bar { grid-column: 1 / -1; margin: 0; height: 3px }
.sheets { margin-top: 20px }
.examples { display: grid; grid-template-columns: repeat(8, minmax(0, 1fr)); gap: 16px }
.examples figure { font-size: 13px; line-height: 1.35; min-width: 0 }
.examples img, .examples .gone, .subject img, .subject .gone { display: block; width: 100%; aspect-ratio: 1;
  object-fit: cover; border-radius: 9px; background: #fff; border: 1px solid var(--rule) }
.examples .gone, .subject .gone { background: var(--tint) }
.examples figcaption { margin-top: 7px; overflow-wrap: anywhere }
.examples b { font-weight: 600; display: block } .examples small { color: var(--soft); font-size: 12.5px }
.examples small:last-child { display: block }

.hit.wrong img { opacity: .75; filter: none }
.query h5 { font-size: 15px; line-height: 1.4; font-weight: 600; margin: 0 0 14px; overflow-wrap: anywhere }
.queries + h4 { margin-top: 30px }
.query.asked { display: grid; grid-template-columns: 92px minmax(0, 1fr); gap: 20px }
.asked .found { grid-template-columns: minmax(0, 1fr); gap: 6px }
.asked .who small { display: inline; margin-left: 8px }
.texts { list-style: none; padding: 0; font-size: 13.5px; line-height: 1.4 }
.texts li { padding: 2px 0 2px 20px; position: relative; overflow-wrap: anywhere }
.wrong-text { color: var(--soft) } .right-text { font-weight: 600 }
.tick { position: absolute; left: 0; color: var(--right) }

.calibration { display: grid; grid-template-columns: minmax(0, 430px) minmax(0, 1fr); gap: 24px; align-items: start }
.ideal { stroke: var(--soft); stroke-dasharray: 4 4 }
.reliability circle { fill-opacity: .55 } .reliability .line { stroke-width: 1.5; opacity: .6 }
.checks { list-style: none; padding: 4px 24px }
.checks > li { padding: 15px 0 15px 28px; position: relative; overflow-wrap: anywhere }
.checks > li + li { border-top: 1px solid var(--rule) }
.checks > li::before { content: "✓"; position: absolute; left: 0; font-weight: 700; color: var(--right) }
.checks .leak { background: var(--warn-tint); margin: 0 -24px; padding: 15px 24px 15px 52px }
.checks .leak::before { content: "!"; color: var(--warn); left: 30px }
.checks .unknown::before { content: "–"; color: var(--soft) }
.checks b { font-weight: 600 }
.places { color: var(--soft); font-size: 13.5px; margin-top: 4px } ul.places { padding-left: 18px }
.places + p { color: var(--soft); font-size: 13.5px }

@media (max-width: 900px) {
  .examples { grid-template-columns: repeat(4, minmax(0, 1fr)) }
  .calibration { grid-template-columns: minmax(0, 1fr) }
  .duel { grid-template-columns: minmax(0, 1fr) } .sides { grid-template-columns: minmax(0, 1fr) }
  .sides > span { display: none }
}
@media (max-width: 560px) {
  .classes .columns { columns: 1 }
  .classes, .confusions, .sheets, .duels { padding-left: 16px; padding-right: 16px }
  .examples { gap: 12px; grid-template-columns: repeat(3, minmax(0, 1fr)) }
  .figures th[scope=row] { min-width: 110px; max-width: 140px }
  .figures th:first-child, .figures td:first-child { padding-left: 16px }
  .figures .set span { left: 16px; display: inline-block; max-width: calc(100vw - 66px) } .mark { right: 4px }
  .figures tbody th[scope=row], .figures thead th:first-child { position: sticky; left: 0; z-index: 1;
                                                               background: var(--card) }
  .legend { display: block; margin: 6px 0 0 }
}
@media print {
  nav { display: none }
  .duel, .class, .card, figure, .found { break-inside: avoid }
  .scroll { overflow: visible } table { font-size: 12px } .figures small, .interval { font-size: 10px }
  .figures :is(th, td) { padding-left: 5px; padding-right: 5px } td .value { min-width: 0 } .mark { right: -2px }
  .figures th[scope=row] { min-width: 90px } .figures .published :is(th, td) { font-size: 11px }
  .published sup { font-size: 8px } .figures :is(th, td):first-child { padding-left: 14px }
  .figures :is(th, td):last-child { padding-right: 14px }
  .bar i, .bar u, .whisker, .whisker i, .whisker b, .set th, .right, .right::after { print-color-adjust: exact }
}
"""
