"""What the HTML pages have in common: self-contained, fit for a phone and for paper, light and dark."""

from __future__ import annotations

from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5d6670; --line: #d9dee3; --faint: #eef1f3; --card: #fff;
  --paper: #f7f8f9; --accent: #008578; --mono: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaec; --soft: #a2abb4; --line: #3a4148; --faint: #2a2f34;
  --card: #1f2327; --paper: #15181b; --accent: #4cc3b6; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; } h2 { font-size: 1.2rem; margin: 0 0 .3rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; padding: 1rem 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
th { color: var(--soft); font-weight: 600; }
code { font-family: var(--mono); white-space: pre-wrap; }
details { margin-top: .8rem; font-size: .85rem; } summary { cursor: pointer; color: var(--soft); }
@media (max-width: 40rem) { body { padding: 1rem .6rem 2rem; } .card { padding: .8rem .8rem; } }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --faint: #eee; --card: #fff; --paper: #fff; }
  body { padding: 0; font-size: 10pt; } .card { border: 0; padding: 0; } .wide { overflow: visible; }
  table, figure, tr { break-inside: avoid; } }
"""


def page_of(title: str, body: str, style: str = "") -> str:
    """A whole page around ``body``, which is HTML; ``title`` is text."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body><main>
<h1>{escape(title)}</h1>
{body}
</main></body>
</html>
"""
