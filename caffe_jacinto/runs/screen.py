"""The display of a run: a live line or two at the bottom of a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from caffe_jacinto.runs.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

PLAIN_SECONDS = 20.0
"""The least time between two progress lines without a terminal."""

LIVE_SECONDS = 0.25
"""The least time between two redraws of the live line."""

LEAST_BAR = 4
GAP = "  "


class LastingStream:
    """A text stream whose reader (a terminal, a pipe) may disappear without ending the program."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        # None: Python was started with its output closed, and there is nothing to write to.
        self._lost = stream is None

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        self._try(text)
        return len(text)

    def flush(self) -> None:
        self._try(None)

    def isatty(self) -> bool:
        try:
            return not self._lost and self._stream is not None and self._stream.isatty()
        except ValueError:
            return False

    def _try(self, text: str | None) -> None:
        if self._lost or self._stream is None:
            return
        try:
            if text is not None:
                self._stream.write(text)
            self._stream.flush()
        except UnicodeEncodeError:
            if text is not None:
                self._try(text.encode(self.encoding, "replace").decode(self.encoding))
        except (OSError, ValueError):
            self._lost = True
            # The rest of the stream's buffer must not fail again at the end of the program.
            with suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


class Screen:
    """Prints lines that stay, and shows the progress of the run."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = LastingStream(stream or sys.stdout)
        self._live: Live | None = None
        self._console: Console | None = None
        self._shown = float("-inf")
        if self._stream.isatty():
            from rich.console import Console

            console = Console(file=self._stream, highlight=False)  # type: ignore[arg-type]
            # A terminal that cannot move up a line (TERM=dumb, as in an editor) gets plain lines.
            self._console = None if console.is_dumb_terminal else console

    def say(self, line: str, *, style: str | None = None) -> None:
        """Print a line that stays; on a terminal in one of rich's styles, e.g. ``bold``."""
        if self._console is None:
            self._stream.write(line + "\n")
        else:
            self._console.print(line, style=style, markup=False, soft_wrap=True)

    def show(self, progress: Progress, fraction: float, *, news: bool) -> None:
        """Show the progress, and how much of the stage is done.

        Without a terminal, a line is printed only when there is ``news``, and at most every 20 s.
        """
        time_now = time.monotonic()
        if self._console is None:
            if news and time_now - self._shown >= PLAIN_SECONDS:
                self._shown = time_now
                self._stream.write(", ".join(progress.fields()) + "\n")
        elif time_now - self._shown >= LIVE_SECONDS:
            self._shown = time_now
            self._draw(progress, fraction)

    def clear(self) -> None:
        """Remove the live line, and let the next progress line appear at once."""
        self._shown = float("-inf")
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self, progress: Progress, fraction: float) -> None:
        from rich.live import Live
        from rich.text import Text

        assert self._console is not None
        lines = "\n".join(live_lines(progress, fraction, self._console.width))
        shown = Text(lines, no_wrap=True, overflow="ellipsis")
        if self._live is None:
            self._live = Live(
                shown, console=self._console, auto_refresh=False, transient=True, redirect_stderr=False
            )
            self._live.start()
        self._live.update(shown, refresh=True)


def live_lines(progress: Progress, fraction: float, width: int) -> list[str]:
    """A bar and all of the progress in one line if it fits, else with the figures in a second line."""
    room = width - LEAST_BAR - len(GAP) - 1
    whole = GAP.join(progress.fields())
    if len(whole) <= room:
        return [_bar(whole, fraction, width) + whole]
    first = _fitting([*progress.place, *progress.left], room)
    bar = _bar(first, fraction, width)
    second = _fitting(progress.figures, width - len(bar) - 1)
    return [bar + first, " " * len(bar) + second] if second else [bar + first]


def _fitting(fields: list[str], room: int) -> str:
    """As many of the fields as fit, and always the first."""
    shown = fields[:1]
    for field in fields[1:]:
        if len(GAP.join([*shown, field])) > room:
            break
        shown.append(field)
    return GAP.join(shown)


def _bar(text: str, fraction: float, width: int) -> str:
    """A bar of up to an eighth of the width, and the gap between it and ``text``."""
    cells = max(min(width // 8, 24, width - len(text) - len(GAP) - 1), LEAST_BAR)
    done = round(min(max(fraction, 0.0), 1.0) * cells)
    return "━" * done + "╌" * (cells - done) + GAP
