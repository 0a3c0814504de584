"""What pages share: the frame of the document, and the style sheet, light and dark."""

from __future__ import annotations

from html import escape

#: Classes c0 ... c7 colour runs, p0 ... p8 the parts of a step (k0 ... k8 in the key).
STYLE = (
    """
:root { --ink: #1f2430; --soft: #667085; --grid: #e6e8ee; --panel: #fff; --edge: #e3e6ec; --page: #f5f6f9;
  --c0: #2f6fde; --c1: #d9622b; --c2: #1b9e77; --c3: #b04a9c; --c4: #c99700; --c5: #56a8dc; --c6: #8a5a44; --c7: #5b6472;
  --p0: #d9622b; --p1: #2f6fde; --p2: #0f5c46; --p3: #1b8a68; --p4: #38b38b; --p5: #7fd1b2; --p6: #b9e6d5;
  --p7: #c99700; --p8: #c5cad5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaf0; --soft: #9aa3b5; --grid: #2c3240; --panel: #1a1e28; --edge: #2c3240; --page: #12151c;
    --c0: #6ea0ff; --c1: #ff9160; --c2: #45cfa3; --c3: #dd86cc; --c4: #e8c04a; --p8: #566074; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 60px; }
h1 { font-size: 25px; margin: 0 0 2px; letter-spacing: -.01em; }
h2 { font-size: 17px; margin: 38px 0 3px; }
p { margin: 0 0 12px; color: var(--soft); max-width: 96ch; }
.panel { background: var(--panel); border: 1px solid var(--edge); border-radius: 10px; padding: 14px 16px;
  overflow-x: auto; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 14px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: right; font-weight: 600; color: var(--soft); font-size: 12.5px; padding: 4px 10px;
  vertical-align: bottom; }
td { text-align: right; padding: 7px 10px; border-top: 1px solid var(--edge); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 2px; }
th.text, td.text { text-align: left; }
td.text { font-size: 13px; }
.best { font-weight: 650; }
.change { color: var(--soft); font-size: 12.5px; font-weight: 400; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 10px; font-size: 13.5px; }
.chip { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; vertical-align: -1px;
  background: currentColor; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11.5px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--soft); }
svg .label { font-size: 12px; fill: var(--ink); }
svg .name { font-size: 13px; fill: var(--ink); }
svg .total { font-size: 13px; fill: var(--ink); font-weight: 600; }
svg .inside { fill: #fff; text-anchor: middle; font-weight: 600; }
svg .p5 + .inside, svg .p6 + .inside, svg .p8 + .inside { fill: #1f2430; }
.grid { stroke: var(--grid); }
.axis, .mark { stroke: var(--soft); stroke-width: 1; }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.line.faint { stroke-width: 1.2; opacity: .4; }
.line.thin { stroke-width: 1.4; }
.dot { fill: currentColor; stroke: var(--panel); stroke-width: 1; }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 16px; margin: 6px 0 0; }
dt { font-weight: 600; }
dd { margin: 0; }
"""
    + "".join(f".c{i} {{ color: var(--c{i}); }}\n" for i in range(8))
    + "".join(f"svg .p{i} {{ fill: var(--p{i}); }}\n.k{i} {{ color: var(--p{i}); }}\n" for i in range(9))
)


def document(title: str, body: str, more_style: str = "") -> str:
    """A whole page as one HTML text that needs no other file."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}{more_style}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )
