"""The progress of a long job over images: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from caffe_jacinto.common.text import duration

LINE_SECONDS = 5.0
"""Time between two plain lines."""

BAR_SECONDS = 0.1
"""Time between two changes of the bar: drawing it for each image would cost more than some images."""


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
