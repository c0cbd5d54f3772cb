"""The report's tables on a terminal, in colour, or in a pipe, as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from caffe_jacinto.logs.tables import STAGE_HEADERS, Row, Table

_PIPE_WIDTH = 10_000
"""In a pipe no line is folded."""
_CHANGE = STAGE_HEADERS.index("Change of top-1")


def show(found: Sequence[Table], out: TextIO) -> None:
    """Write the tables to ``out``."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(file=out, highlight=False, width=None if out.isatty() else _PIPE_WIDTH)
    for number, table in enumerate(found):
        if number:
            console.print()
        # An escape sequence cannot hide in a Text, and nothing in it is taken for markup.
        console.print(Text(table.title, style="bold"))
        drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
        for column, header in enumerate(table.headers):
            drawn.add_column(header, justify="right" if column else "left", overflow="fold")
        for row in table.rows:
            drawn.add_row(*(Text(cell, style=_style(table, row, at)) for at, cell in enumerate(row.cells)))
        console.print(drawn)
        for note in table.notes:
            console.print(Text(note, style="red"), soft_wrap=True)


def _style(table: Table, row: Row, column: int) -> str:
    cell = row.cells[column]
    if row.kind == "published":
        return "dim"
    if table.headers is STAGE_HEADERS and column == _CHANGE:
        return {"+": "green", "-": "red"}.get(cell[:1], "") if cell.strip("+-0.") else ""
    if column == 0:
        return "yellow" if row.kind == "unfinished" else "cyan"
    return ""
