"""A page that shows tables, lines, bars and pictures in any browser: one file, which needs nothing from anywhere.

All text is escaped; there are no scripts, and nothing is loaded (the page's own policy forbids it).
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple, TypeAlias

from megalith.reports.table import Table

STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } th, td { padding: .3rem .8rem; border-bottom: 1px solid #dde3ea; text-align: left }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.bar { display: flex; gap: .6rem; align-items: center; margin: .25rem 0 }
.bar span { flex: 0 0 22rem; overflow-wrap: anywhere } .bar i { height: 1rem; background: #3b78c3; display: block }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8882; padding: .5rem; margin: .3rem 0 }
.bar b { font-weight: normal; font-variant-numeric: tabular-nums }
@media (prefers-color-scheme: dark) { body { background: #14191f; color: #dfe6ee } th, td { border-color: #37424e } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Lines(NamedTuple):
    """A list of lines of text."""

    title: str
    lines: Sequence[str]


class Bars(NamedTuple):
    """A bar for each of some numbers that are not negative: (its name, the number, the number as text)."""

    title: str
    bars: Sequence[tuple[str, float, str]]


class Folded(NamedTuple):
    """Texts that a click unfolds, each with a line on what it is ("": none). Its title is a line too, no heading."""

    title: str
    texts: Sequence[tuple[str, str]]


class Picture(NamedTuple):
    """A PNG, in base64; its title is what it shows."""

    title: str
    png: str


Part: TypeAlias = Table | Lines | Bars | Folded | Picture


def page(title: str, parts: Sequence[Part]) -> str:
    """The page as HTML."""
    body = "\n".join(map(_part, parts))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _part(part: Part) -> str:
    if isinstance(part, Folded):
        texts = (f"{f'<p>{escape(line)}</p>' if line else ''}<pre>{escape(text)}</pre>\n" for line, text in part.texts)
        return f"<details><summary>{escape(part.title)}</summary>\n{''.join(texts)}</details>"
    if isinstance(part, Picture):
        return f'<p><img alt="{escape(part.title)}" src="data:image/png;base64,{escape(part.png)}"></p>'
    heading = f"<h2>{escape(part.title)}</h2>\n"
    if isinstance(part, Lines):
        return heading + "<ul>\n" + "".join(f"<li>{escape(line)}</li>\n" for line in part.lines) + "</ul>"
    if isinstance(part, Bars):
        largest = max((value for _, value, _ in part.bars), default=0.0) or 1.0
        rows = (
            f'<div class="bar"><span>{escape(name)}</span><i style="width: {20 * value / largest:.3f}rem"></i>'
            f"<b>{escape(text)}</b></div>\n"
            for name, value, text in part.bars
        )
        return heading + "".join(rows)
    head = "".join(_cell("th", name, number in part.numeric) for number, name in enumerate(part.columns))
    rows = (
        "<tr>" + "".join(_cell("td", text, number in part.numeric) for number, text in enumerate(row)) + "</tr>\n"
        for row in part.rows
    )
    return f"{heading}<table>\n<tr>{head}</tr>\n{''.join(rows)}</table>"


def _cell(tag: str, text: str, numeric: bool) -> str:
    kind = ' class="number"' if numeric else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"
