"""The report page's style sheet: one column of text, wider figures, light and dark by the reader's own setting.

Colours keep one meaning throughout: orange is what should go, blue is what should stay, and both differ in lightness
and always come with words or shapes, so that no reader depends on hue.
"""

CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #16191d; --soft: #565d68; --faint: #d9dce1; --panel: #f5f6f8;
  --forget: #b8480a; --retain: #1a5fa8; --text: #6a4c93; --gold: #8a6500; --grey: #737a85;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121417; --ink: #eceef1; --soft: #a8afba; --faint: #33383f; --panel: #1b1e23;
    --forget: #ff9b5e; --retain: #7fb8f5; --text: #c3a6ee; --gold: #e2b84b; --grey: #9097a3;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 1rem/1.6 var(--sans); }
main { max-width: 1116px; margin: 0 auto; padding: 56px 18px 72px; }
h1, h2 { font-family: var(--serif); font-weight: 600; letter-spacing: -0.01em; }
h1 { font-size: clamp(1.62rem, 1.1rem + 2.1vw, 2.5rem); line-height: 1.22; margin: 0 0 40px; max-width: 26em; }
h2 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 8px; }
h3 { font-size: 0.95rem; font-weight: 650; margin: 0 0 2px; }
section { margin-top: 76px; }
p { margin: 0 0 14px; max-width: 42rem; }
.kicker, .note, figcaption { color: var(--soft); font-size: 0.875rem; line-height: 1.5; }
.kicker { margin-bottom: 14px; overflow-wrap: anywhere; }
.note, figcaption { max-width: 42rem; }
b, strong { font-weight: 650; }
.forget { --mark: var(--forget); } .retain { --mark: var(--retain); } .text { --mark: var(--text); }
.gold { --mark: var(--gold); } .muted { --mark: var(--soft); }
.grey { --mark: var(--grey); } .ink { --mark: var(--ink); }
h1 .figures { font-variant-numeric: lining-nums tabular-nums; color: var(--mark); }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }

.keys { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 20px clamp(24px, 4vw, 48px); }
.key { border-top: 3px solid var(--mark); padding-top: 12px; }
.key h3 { color: var(--soft); font-weight: 500; }
.big { font: 600 clamp(1.5rem, 2.9vw, 2.1rem)/1.25 var(--sans); font-variant-numeric: tabular-nums;
  letter-spacing: -0.02em; margin: 0 0 10px; }
.big .from { color: var(--soft); font-weight: 400; }
.big .to { color: var(--mark); }
.key .note { margin: 10px 0 0; }
.criteria { list-style: none; margin: 44px 0 0; padding: 0; display: grid; gap: 0 48px;
  grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); font-size: 0.875rem; }
.criteria li { border-top: 1px solid var(--faint); padding: 8px 0; display: grid; gap: 0 10px;
  grid-template-columns: 1.1em 1fr auto; font-variant-numeric: tabular-nums; }
.criteria .asked { grid-column: 2 / 4; color: var(--soft); }
.yes, .no { font-weight: 700; }
.yes { color: var(--retain); } .no { color: var(--forget); }
.criteria.certificate { margin-top: 20px; }
.narrow-table { max-width: 42rem; }
.criteria-title { margin: 44px 0 -32px; font-weight: 650; font-size: 0.95rem; }

.group { margin-top: 36px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 32px 24px;
  margin-top: 14px; }
.card { margin: 0; min-width: 0; font-size: 0.875rem; line-height: 1.4; overflow-wrap: anywhere; }
.card img { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain; border-radius: 6px;
  background: var(--panel); outline: 1px solid var(--faint); outline-offset: -1px; }
.card img.small { image-rendering: pixelated; }
.card .name { font-weight: 650; margin: 10px 0 0; }
.card .question { color: var(--soft); margin: 0 0 6px; }
.card dl { display: grid; grid-template-columns: 3.6em 1fr; gap: 2px 6px; margin: 0; }
.card dt { color: var(--soft); font-size: 0.8125rem; line-height: 1.5; }
.card dd { margin: 0; }
.card dd.mark { font-weight: 600; }

table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.9375rem;
  line-height: 1.35; }
th, td { text-align: right; padding: 9px 0 9px 14px; vertical-align: top; border-top: 1px solid var(--faint);
  font-weight: 400; }
thead th { border-top: 0; color: var(--soft); font-size: 0.8125rem; padding-top: 2px; padding-bottom: 5px;
  vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 500; }
tr.head th { padding-top: 22px; padding-bottom: 6px; border-top: 0; font-weight: 650; }
thead + tbody tr.head:first-child th { padding-top: 8px; }
td small, th small { display: block; color: var(--soft); font-size: 0.78rem; font-weight: 400; white-space: nowrap; }
td.after { font-weight: 650; }
td.strip-cell { width: 31%; padding-left: 40px; padding-right: 6px; padding-top: 11px; }
th.strip-cell { padding-left: 40px; padding-right: 6px; }
.scale { display: flex; justify-content: space-between; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(310px, 1fr)); gap: 40px 56px; margin-top: 44px;
  align-items: start; }

.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 36px 30px; margin-top: 24px; }
.plots.two { grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); max-width: 780px; gap: 36px 48px; }
figure { margin: 0; min-width: 0; }
figure h3 { margin-bottom: 5px; }
figcaption { margin-top: 8px; }
svg { display: block; overflow: visible; }
svg.chart { width: 100%; height: auto; max-width: 440px; }
svg.wide { max-width: 760px; }
svg.narrow { display: none; }
svg text { font: 12px var(--sans); fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .tick, svg .axis { fill: var(--soft); }
svg .label { fill: var(--mark); font-weight: 600; paint-order: stroke; stroke: var(--page); stroke-width: 3px;
  stroke-linejoin: round; }
svg .label.muted { font-weight: 400; }
svg .grid { stroke: var(--faint); stroke-width: 1; }
svg .base { stroke: var(--grey); stroke-width: 1; }
svg .rule { stroke: var(--mark); stroke-width: 1.2; stroke-dasharray: 3 3; }
svg .curve { fill: none; stroke: var(--mark); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .band { fill: var(--mark); opacity: 0.16; }
svg .dot { fill: var(--mark); stroke: var(--page); stroke-width: 1.5; }
svg .hollow { fill: var(--page); stroke: var(--mark); stroke-width: 2; }
svg .interval { stroke: var(--mark); stroke-width: 1.2; opacity: 0.55; }
svg .range { stroke: var(--mark); stroke-width: 9; opacity: 0.22; }
svg .move { stroke: var(--mark); stroke-width: 2; }
svg .goal { fill: var(--retain); opacity: 0.12; }
svg .leader { fill: none; stroke: var(--grey); stroke-width: 0.8; }
svg .arrow { fill: none; stroke: var(--grey); stroke-width: 1.3; stroke-linecap: round; stroke-linejoin: round; }

.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(310px, 1fr)); gap: 36px 56px; margin-top: 20px; }
.list { margin: 8px 0 0; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
.list div { break-inside: avoid; display: flex; justify-content: space-between; gap: 20px; padding: 2.5px 0; }
.list dt { color: var(--soft); flex: none; max-width: 62%; overflow-wrap: anywhere; }
.list dd { margin: 0; text-align: right; overflow-wrap: anywhere; min-width: 0; }
.times { list-style: none; margin: 8px 0 0; padding: 0; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
.times li { display: flex; justify-content: space-between; gap: 12px; flex-wrap: wrap; padding-bottom: 7px; }
.times .bar { flex-basis: 100%; height: 4px; background: var(--panel); }
.times .bar i { display: block; height: 4px; background: var(--grey); }
.after-plots { margin-top: 14px; }
.checksum { margin-top: 28px; }
details { margin-top: 34px; }
summary { cursor: pointer; font-size: 0.95rem; font-weight: 650; }
details .list { columns: 300px 3; column-gap: 56px; }
code { font: 0.8125rem ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
footer { margin-top: 72px; padding-top: 14px; border-top: 1px solid var(--faint); }

@media (max-width: 700px) {
  main { padding-top: 32px; }
  h1 { margin-bottom: 28px; }
  section { margin-top: 60px; }
  .keys { grid-template-columns: minmax(0, 1fr); gap: 30px; }
  .big { font-size: 2rem; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 26px 16px; }
  .strip-cell { display: none; }
  .pair, .facts, .plots, .plots.two { grid-template-columns: minmax(0, 1fr); }
  .criteria { grid-template-columns: minmax(0, 1fr); }
  table { font-size: 0.875rem; table-layout: fixed; }
  th, td { padding-left: 5px; }
  thead th { font-size: 0.75rem; }
  thead th:first-child { width: 27%; }
  thead th.change { width: 16%; }
  .pair thead th:first-child { width: 37%; }
  td small, th small { font-size: 0.72rem; }
  svg.wide { display: none; }
  svg.narrow { display: block; }
}
@media print { section, .card, figure { break-inside: avoid; } details { display: block; } }
"""
