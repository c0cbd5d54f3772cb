"""Text for people: durations, counts, suggestions, printable names, and tables."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TextIO

_PIPE_WIDTH = 10_000
"""Width of a table that does not go to a terminal: no line is folded."""

_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def duration(seconds: float, *, exact: bool = False) -> str:
    """``4.7 s``, ``45 s``, ``2 min 34 s``, ``13 h 59 min``, ``2 d 4 h``: the two largest units.

    ``exact`` gives all units down to seconds, and tenths of a second below a minute: ``13 h 59 min 49 s``.
    """
    if seconds < (59.95 if exact else 9.95):
        return f"{max(seconds, 0.0):.1f} s"
    left = round(seconds)
    counts: list[tuple[int, str]] = []
    for size, unit in _UNITS:
        count, left = divmod(left, size)
        if count or counts:
            counts.append((count, unit))
    return " ".join(f"{count} {unit}" for count, unit in (counts if exact else counts[:2]))


def count_of(number: int, noun: str) -> str:
    """``1 image``, ``1,200 images``, ``3 classes``."""
    plural = "" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}{plural}"


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """``did you mean X? known: X, Y, Z``; without a name that is close to ``wrong``, ``known: X, Y, Z``."""
    names = list(known)
    nearest = difflib.get_close_matches(wrong, names, n=1)
    allowed = f"known: {', '.join(names)}"
    return f"did you mean {nearest[0]}? {allowed}" if nearest else allowed


def printable(text: str) -> str:
    """``text`` with characters that could steer a terminal or break a row shown as escapes."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


class Column(NamedTuple):
    """A column's heading, whether it holds words (aligned left) or numbers, and its total."""

    title: str
    words: bool = False
    total: str = ""


class Line(NamedTuple):
    """A row's cells, and their style: one of rich's for the whole row, or one for each cell."""

    cells: Sequence[str]
    style: str | Sequence[str] = ""


def show_table(
    out: TextIO,
    title: str,
    columns: Sequence[Column],
    lines: Sequence[Line],
    *notes: str,
    note_style: str = "",
) -> None:
    """Write a table to ``out`` with ``title`` above and ``notes`` below it; in colour on a terminal."""
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
        styles = [line.style] * len(line.cells) if isinstance(line.style, str) else line.style
        # In a Text no escape sequence takes effect, and nothing counts as markup.
        table.add_row(*(Text(printable(c), style=s) for c, s in zip(line.cells, styles, strict=True)))
    if title:
        console.print(Text(printable(title), style="bold"))
    console.print(table)
    for note in notes:
        console.print(Text(printable(note), style=note_style), soft_wrap=True)
