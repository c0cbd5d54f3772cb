"""A table for people: in colour on a terminal, plain and unfolded in a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TextIO

_PIPE_WIDTH = 10_000
"""In a pipe no line is folded."""


class Column(NamedTuple):
    """A column's heading, whether it is words (to the left) or numbers, and its total."""

    title: str
    words: bool = False
    total: str = ""


class Line(NamedTuple):
    """A row's cells, and rich's word for how they look."""

    cells: Sequence[str]
    style: str = ""


def show_table(
    out: TextIO, title: str, columns: Sequence[Column], lines: Sequence[Line], *notes: str
) -> None:
    """Write a table to ``out`` with ``title`` above and ``notes`` below it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=out, highlight=False, width=None if out.isatty() else _PIPE_WIDTH)
    has_totals = any(column.total for column in columns)
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", show_footer=has_totals
    )
    for column in columns:
        side: Any = "left" if column.words else "right"
        table.add_column(column.title, justify=side, footer=Text(column.total, style="bold"), overflow="fold")
    for line in lines:
        # An escape sequence cannot hide in a Text, and nothing in it is taken for markup.
        table.add_row(*(Text(printable(cell), style=line.style) for cell in line.cells))
    if title:
        console.print(Text(printable(title), style="bold"))
    console.print(table)
    for note in notes:
        console.print(Text(printable(note)), soft_wrap=True)


def printable(text: str) -> str:
    """A name out of somebody's file cannot move the terminal's cursor."""
    return "".join(character if character.isprintable() else "?" for character in text)
