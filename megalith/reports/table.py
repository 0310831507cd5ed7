"""A table of texts, and how a terminal shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text


class Table(NamedTuple):
    """Cells are texts. numeric: the columns whose cells are numbers, which stand at the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[int] = ()


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table; where standard output is no terminal, long cells are not cut and not wrapped."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=10_000, highlight=False)
    shown = RichTable(box=box.SIMPLE_HEAD)
    for number, name in enumerate(table.columns):
        shown.add_column(Text(name), justify="right" if number in table.numeric else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(Text, row))  # as Text, so that [brackets] are no markup
    console.print(Text(table.title, style="bold"))  # as a title of the table it would be as narrow as that
    console.print(shown)


def number_text(value: float) -> str:
    """Six digits of a number; a whole number as it is."""
    return str(value) if isinstance(value, int) else f"{value:.6g}"
