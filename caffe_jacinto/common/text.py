"""Text for people: durations, counts, suggestions, printable names, tables, and the progress of long jobs."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TextIO

_PIPE_WIDTH = 10_000
"""Width of a table that does not go to a terminal: no line is folded."""

LINE_SECONDS = 5.0
"""Time between two plain lines."""

BAR_SECONDS = 0.1
"""Time between two changes of the bar: drawing it for each image would cost more than some images."""

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
    import difflib

    names = list(known)
    nearest = [name for name in names if name.casefold() == wrong.casefold()]
    nearest = nearest or difflib.get_close_matches(wrong, names, n=1)
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


@contextlib.contextmanager
def image_progress(
    what: str, total: int, *, done: int = 0, unit: str = "images"
) -> Iterator[Callable[..., None]]:
    """Show on stderr how many of ``total`` images are done; the block calls the given function per image.

    The function takes how many more are done (one, if not said); ``done`` of them were before.
    """
    if sys.stderr.isatty():
        with _bar(what, total, done, unit) as advance:
            yield advance
    else:
        yield _plain_lines(what, total, done, unit)


@contextlib.contextmanager
def _bar(what: str, total: int, done: int, unit: str) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f} {unit}/s" if speed else "")

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what.replace("[", r"\["), total=total, completed=done)
        waiting, shown_at = 0, time.monotonic()

        def advance(count: int = 1) -> None:
            nonlocal waiting, shown_at
            waiting += count
            now = time.monotonic()
            if now - shown_at >= BAR_SECONDS:
                progress.advance(task, waiting)
                waiting, shown_at = 0, now

        yield advance
        progress.advance(task, waiting)


def _plain_lines(what: str, total: int, before: int, unit: str) -> Callable[..., None]:
    start = time.monotonic()
    done = 0
    next_line = start + LINE_SECONDS

    def advance(count: int = 1) -> None:
        nonlocal done, next_line
        done += count
        now = time.monotonic()
        if now >= next_line and before + done < total and done:
            next_line = now + LINE_SECONDS
            speed = done / (now - start)
            left = duration((total - before - done) / speed)
            print(
                f"{what}: {before + done:,} of {total:,} {unit}, {speed:,.0f} {unit}/s, {left} left",
                file=sys.stderr,
                flush=True,
            )

    return advance
