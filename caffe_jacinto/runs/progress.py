"""A run's progress, in words (how far, figures, speed, time left), and the terminal or file that shows it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from caffe_jacinto.common.text import duration
from caffe_jacinto.logs.stage import StageLog
from caffe_jacinto.recipes.model import Recipe

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

PLAIN_SECONDS = 20.0
"""The least time between two progress lines without a terminal."""

LIVE_SECONDS = 0.25
"""The least time between two redraws of the live line."""

LEAST_BAR = 4
GAP = "  "

SILENT_SECONDS = 30.0
"""A log without a new line for this long is worth mentioning."""

SHOWN = 8
"""Outputs of a test that are shown in a line."""


@dataclass(frozen=True)
class Place:
    """A stage's place in its recipe."""

    recipe: Recipe
    name: str

    @property
    def number(self) -> int:
        return list(self.recipe.stages).index(self.name) + 1

    @property
    def max_iter(self) -> int:
        return self.recipe.stages[self.name].max_iter

    def title(self) -> str:
        return f"stage {self.number}/{len(self.recipe.stages)} {self.name}"

    def iterations_after(self) -> int:
        """Of the stages that follow."""
        following = list(self.recipe.stages.values())[self.number :]
        return sum(stage.max_iter for stage in following)


@dataclass(frozen=True)
class Progress:
    """The progress of something that runs; in each list, the most important comes first."""

    place: list[str]
    """Which stage, which iteration."""

    figures: list[str] = field(default_factory=list)
    """What it is doing, loss, learning rate, sparsity, speed."""

    left: list[str] = field(default_factory=list)
    """The time left."""

    def fields(self) -> list[str]:
        return [*self.place, *self.figures, *self.left]


def progress(log: StageLog, place: Place, *, running: bool = True, silent: float = 0.0) -> Progress:
    """How far a stage is; without a speed unless it is ``running``.

    ``silent`` is how many seconds ago the last line of its log came.
    """
    where = [place.title(), f"iteration {log.iteration or 0:,}/{place.max_iter:,}"]
    # First among the figures, not in `where`: the bar's length depends on that and should not jump.
    figures = _doing(log, place) if running else []
    if log.loss is not None:
        figures.append(f"loss {log.loss:.4g}")
    if log.learning_rate is not None:
        figures.append(f"lr {log.learning_rate:.3g}")
    figures += sparsity_field(log)
    pace = log.seconds_per_iteration()
    if not running:
        return Progress(where, figures)
    if pace:
        figures.append(f"{place.recipe.training.batch_size / pace:.3g} images/s")
    return Progress(where, figures + last_heard(silent), time_left(log, place, silent))


def test_progress(log: StageLog) -> tuple[int, int, str]:
    """Of a test: how much is done, of how much, and in words."""
    found = log.quantizing
    if found is not None:
        return found.done, found.total, f"{found.what} {found.done:,}/{found.total:,} images"
    done, total = log.iteration or 0, log.batches or 0
    return done, total, f"batch {done:,}/{total:,}"


def _doing(log: StageLog, place: Place) -> list[str]:
    """What keeps the iterations from advancing, if anything does."""
    if log.in_test:
        return ["testing"]
    return ["finishing"] if (log.iteration or 0) >= place.max_iter else []


def sparsity_field(log: StageLog) -> list[str]:
    """The sparsity by the report's rule, or where the network is not known, the log's own figure."""
    if log.sparsity is not None:
        return [f"sparsity {log.sparsity:.3f}"]
    return [] if log.sparsity_logged is None else [f"sparsity {log.sparsity_logged:.3f} (as logged)"]


def last_heard(silent: float) -> list[str]:
    """How long the log has not grown: slow iterations, a long test, or a Caffe that hangs."""
    return [f"last line {duration(silent)} ago"] if silent >= SILENT_SECONDS else []


def time_left(log: StageLog, place: Place, silent: float = 0.0) -> list[str]:
    """Of the stage and, where other stages follow, of the run, at this stage's pace. Empty: not known yet."""
    pace = log.seconds_per_iteration()
    if pace is None:
        return []
    here = max(place.max_iter - (log.iteration or 0), 0) * pace
    after = place.iterations_after() * pace
    here_now = max(here - silent, 0.0)
    left = [f"{duration(here_now)} left"] if here else []
    return [*left, f"{duration(here_now + after)} for the run"] if after else left


def outputs_line(log: StageLog, outputs: Mapping[str, float]) -> str:
    """A test's results, accuracies first: ``top-1 0.61, top-5 0.83, loss 1.67``."""
    names = log.accuracy_names()
    first = [(names[name], outputs[name]) for name in names if name in outputs]
    found = first + sorted((name, value) for name, value in outputs.items() if name not in names)
    more = [f"and {len(found) - SHOWN} more"] if found[SHOWN:] else []
    return ", ".join([f"{name} {value:.4g}" for name, value in found[:SHOWN]] + more)


def stage_summary(log: StageLog, place: Place, seconds: float) -> str:
    """A finished stage in one line."""
    parts = [f"{place.title()}: finished, {place.max_iter:,} iterations in {duration(seconds)}"]
    test = log.tests.get(place.max_iter)
    if test is not None and test.top1 is not None:
        # Such a test can differ much from the one before, which had running statistics.
        how = " with recalibrated batch-norm statistics" if test.recalibrated else ""
        parts.append(f"top-1 {test.top1:.4g}{how}")
    return ", ".join(parts + sparsity_field(log))


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


def shown(show: Callable[[TextIO], None]) -> None:
    """Have ``show`` write to stdout, unless that was closed from the start, or its reader has gone."""
    if sys.stdout is not None:
        with suppress(OSError, SystemExit):  # rich ends a program whose reader has gone
            show(sys.stdout)


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
    for text in fields[1:]:
        if len(GAP.join([*shown, text])) > room:
            break
        shown.append(text)
    return GAP.join(shown)


def _bar(text: str, fraction: float, width: int) -> str:
    """A bar of up to an eighth of the width, and the gap between it and ``text``."""
    cells = max(min(width // 8, 24, width - len(text) - len(GAP) - 1), LEAST_BAR)
    done = round(min(max(fraction, 0.0), 1.0) * cells)
    return "━" * done + "╌" * (cells - done) + GAP
