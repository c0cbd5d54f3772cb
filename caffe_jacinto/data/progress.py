"""How far a long job over images is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LINE_SECONDS = 5.0
"""Time between two plain lines."""


@contextlib.contextmanager
def image_progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Show on stderr how many of ``total`` images are done; the block calls the given function per image."""
    if sys.stderr.isatty():
        with _bar(what, total) as advance:
            yield advance
    else:
        yield _plain_lines(what, total)


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[], None]]:
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
            return Text(f"{speed:,.0f} images/s" if speed else "")

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what.replace("[", r"\["), total=total)
        yield lambda: progress.advance(task)


def _plain_lines(what: str, total: int) -> Callable[[], None]:
    start = time.monotonic()
    done = 0
    next_line = start + LINE_SECONDS

    def advance() -> None:
        nonlocal done, next_line
        done += 1
        now = time.monotonic()
        if now >= next_line and done < total:
            next_line = now + LINE_SECONDS
            speed = done / (now - start)
            left = time_text((total - done) / speed)
            print(
                f"{what}: {done:,} of {total:,} images, {speed:,.0f} images/s, {left} left",
                file=sys.stderr,
                flush=True,
            )

    return advance


def time_text(seconds: float) -> str:
    """A duration as a person reads it: '0.8 s', '12 s', '3 min 20 s', '2 h 05 min'."""
    if seconds < 9.95:
        return f"{max(seconds, 0.1):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count_text(count: int, what: str) -> str:
    """A number of things as a person reads it: '1 image', '1,200 images'."""
    return f"{count:,} {what}{'s' * (count != 1)}"
