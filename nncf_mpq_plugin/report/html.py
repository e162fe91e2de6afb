"""HTML from plain values: everything that is not markup is escaped here and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --text: #1c2024; --muted: #626a73; --grid: #e3e6e9; --line: #d5d9dd;
  --weight: #2563b0; --activation: #b4530a; --mixed: #0b7a4b; --uniform: #8a3ea8; --other: #5b6b7c;
  --early: #7aa5d8; --late: #8c2f5c; --good: #0b7a4b; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1b1f23; --text: #e6e8ea; --muted: #9aa3ac; --grid: #31373d; --line: #3a4148;
    --weight: #6ea8f5; --activation: #f0a052; --mixed: #4fc78c; --uniform: #cf8be8; --other: #a3b1bf;
    --early: #5f8fd0; --late: #f096b8; --good: #4fc78c; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 16px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 8px; }
p { margin: 8px 0; max-width: 75ch; }
.note { color: var(--muted); font-size: 0.9rem; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 16px 0; }
.tile, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; }
.tile span { color: var(--muted); font-size: 0.85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 12px; }
figure { margin: 12px 0; min-width: 0; }
.figures figure { margin: 0; }
.scroll { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; max-width: calc(1.5px * var(--width)); margin: 0; }
svg text { font-family: inherit; }
.wide svg { min-width: calc(0.9px * var(--width)); }
svg .tip:hover { opacity: 0.6; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 8px 0; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; }
tbody tr.chosen { font-weight: 600; }
.words th, .words td { text-align: left; white-space: normal; overflow-wrap: break-word; }
pre { overflow-x: auto; font-size: 0.8rem; background: var(--card); border: 1px solid var(--line); padding: 12px; }
summary { cursor: pointer; padding: 4px 0; }
code { font-size: 0.9em; overflow-wrap: anywhere; }
@media print { .scroll { overflow: visible; } details { display: block; } }
"""


def page(name: str, body: Sequence[str]) -> str:
    """
    :param name: of the document, for the browser's tab.
    :param body: markup.
    :return: the document. Its policy forbids browsers to load anything or to run any script.
    """
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(name)}</title><style>{STYLE}</style></head><body><main>",
            *body,
            "</main></body></html>\n",
        )
    )


def title(text: str) -> str:
    """:return: the page's own heading."""
    return f"<h1>{escape(text)}</h1>"


def heading(text: str) -> str:
    """:return: a section's heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """:param kind: ``note``, ``good`` or ``bad``."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def hint(text: str, command: str) -> str:
    """:return: a note that ends in a command."""
    return f'<p class="note">{escape(text)} <code>{escape(command)}</code></p>'


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """:param values: a figure and what it is, for each tile."""
    inner = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in values
    )
    return f'<div class="tiles">{inner}</div>'


def figures(drawings: Sequence[str]) -> str:
    """:param drawings: ``<svg>`` elements, side by side where there is room."""
    return f'<div class="figures">{"".join(f"<figure>{drawing}</figure>" for drawing in drawings)}</div>'


def wide_figure(drawing: str) -> str:
    """:param drawing: an ``<svg>`` element that scrolls sideways where it is too wide."""
    return f'<figure class="wide"><div class="scroll">{drawing}</div></figure>'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, chosen: str = "", kind: str = "") -> str:
    """
    :param rows: the first entry of each is its name.
    :param chosen: name of the row to stress.
    :param kind: ``words`` for cells that are no numbers.
    """
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    body = "".join(
        f"<tr{_class('chosen' if row[0] == chosen else '')}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table{_class(kind)}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(name: str, content: str) -> str:
    """:param content: markup, shown on request."""
    return f"<details><summary>{escape(name)}</summary>{content}</details>"


def as_json(value: Any) -> str:
    """:return: a JSON value as it would stand in a file."""
    return f"<pre>{escape(json.dumps(value, indent=1))}</pre>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
