"""The style sheet of the page."""

from __future__ import annotations

STYLE = """
:root {
  --paper: #fcfcfb; --card: #ffffff; --ink: #1b1f24; --dim: #5f6872; --line: #e3e5e8;
  --good: #0f766e; --bad: #b42331; --warn: #8f5200; --warn-paper: #fff5e0; --bad-paper: #fdeceb;
  --soft: #e8ecef; --same: #7d8894; --allowed: #cfe9e4; --stage: #5b7fb5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1b1f23; --ink: #e7e9eb; --dim: #98a2ac; --line: #2d3339;
    --good: #4fc7b8; --bad: #ff8078; --warn: #f2b84b; --warn-paper: #33270f; --bad-paper: #3a1a1b;
    --soft: #2a3036; --same: #8a949e; --allowed: #1d4540; --stage: #7ea2d8;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 940px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 16px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 12px; }
p { margin: 6px 0; }
code, .name { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code, .name { overflow-wrap: anywhere; }
td { overflow-wrap: break-word; }
td.first { white-space: nowrap; }
.kicker { margin: 0 0 2px; color: var(--dim); }
.dim, footer { color: var(--dim); }
.caption { font-size: 13px; margin: 4px 0 14px; }
.warning {
  padding: 10px 14px; border-left: 4px solid var(--warn); background: var(--warn-paper); color: var(--warn);
  font-weight: 600; overflow-wrap: anywhere;
}
.warning.failed { border-color: var(--bad); background: var(--bad-paper); color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 16px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.tile-label { color: var(--dim); font-size: 13px; }
.figure { font-size: 23px; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile .dim { font-size: 13px; min-height: 1.5em; }
.good .figure, td.good { color: var(--good); white-space: nowrap; }
.bad .figure, td.bad { color: var(--bad); }
.warn .figure { color: var(--warn); }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 16px 0;
}
.chart {
  display: grid; grid-template-columns: minmax(80px, 26%) 1fr minmax(60px, max-content); gap: 4px 14px;
  align-items: center; margin: 4px 0 14px;
}
.chart .label { overflow-wrap: anywhere; font-size: 13px; line-height: 1.25; }
.chart .value { font-size: 13px; color: var(--dim); font-variant-numeric: tabular-nums; }
svg { display: block; overflow: visible; }
svg text { fill: var(--dim); font-size: 11px; }
.original { fill: var(--soft); }
.better { fill: var(--good); } .worse { fill: var(--bad); } .same { fill: var(--same); }
.reference { stroke: var(--dim); stroke-dasharray: 2 2; }
.whisker { stroke: var(--ink); stroke-width: 1.5; }
.rail { stroke: var(--line); }
.allowed { fill: var(--allowed); }
.limit { stroke: var(--ink); stroke-width: 1.5; }
.pareto { width: 100%; height: auto; margin: 4px 0 14px; }
.front { fill: none; stroke: var(--good); stroke-width: 1.5; stroke-dasharray: 4 3; }
.leader { fill: none; stroke: var(--dim); stroke-width: .7; opacity: .5; }
.curve { fill: none; stroke-width: 2; }
g.better { stroke: var(--good); } g.worse { stroke: var(--bad); }
g.same { stroke: var(--same); } g.stage { stroke: var(--stage); }
.disc { fill-opacity: .75; stroke: var(--card); stroke-width: 1; }
.stage { fill: var(--stage); }
rect.pass-kept { fill: var(--good); } rect.pass-dropped { fill: var(--bad); }
rect.pass-unchanged { fill: var(--same); } rect.pass-skipped { fill: var(--warn); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; margin: 4px 0 8px; }
th, td {
  text-align: left; font-weight: 400; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top;
}
thead th { color: var(--dim); font-size: 13px; }
tbody tr:last-child > * { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.pass { border-top: 1px solid var(--line); padding: 8px 0; }
.pass summary { cursor: pointer; list-style: none; }
.pass summary::-webkit-details-marker { display: none; }
.pass summary, div.pass {
  display: grid; grid-template-columns: 14px 92px 240px 1fr max-content; gap: 2px 12px; align-items: baseline;
}
.pass summary::before { content: "\\25b8"; color: var(--dim); }
.pass[open] summary::before { content: "\\25be"; }
div.pass::before { content: ""; }
.status { font-weight: 600; }
.status.pass-kept { color: var(--good); } .status.pass-dropped { color: var(--bad); }
.status.pass-skipped { color: var(--warn); } .status.pass-unchanged { color: var(--dim); }
td.name, th.name { min-width: 170px; }
details > .scroll { margin: 6px 0 6px 16px; }
ul { margin: 6px 0; padding-left: 20px; }
footer { font-size: 13px; margin-top: 20px; overflow-wrap: anywhere; }
@media (max-width: 560px) {
  main { padding: 20px 12px; }
  section { padding: 14px; }
  .chart { grid-template-columns: 1fr; gap: 2px; }
  .chart .label:not(:first-child) { margin-top: 6px; }
  .pass summary, div.pass { grid-template-columns: 14px 1fr max-content; }
  .pass code, .pass .outcome { grid-column: 2 / span 2; }
  .pass .time { grid-row: 1; grid-column: 3; }
}
@media print { section, .tile { break-inside: avoid; } }
"""
