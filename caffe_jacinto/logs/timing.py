"""The time that the processes of a stage took."""

from __future__ import annotations

from dataclasses import dataclass

from caffe_jacinto.logs import events
from caffe_jacinto.logs.events import elapsed


@dataclass
class _Process:
    """The process whose lines are being read."""

    first_stamp: str | None = None
    logged_seconds: int | None = None
    first_progress: events.TrainProgress | None = None
    last_progress: events.TrainProgress | None = None


@dataclass(frozen=True)
class Spent:
    """Time of processes, and what was done in it."""

    seconds: float = 0.0
    iterations: int = 0
    """Between the first and the last line of training."""
    training: float = 0.0
    """Seconds between those two lines."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.seconds + other.seconds,
            self.iterations + other.iterations,
            self.training + other.training,
        )


class Timing:
    """The time that a log's processes took. The gaps between them do not count."""

    def __init__(self) -> None:
        self._process = _Process()
        self._before = Spent()

    def start_process(self, event: events.ProcessStarted, first_stamp: str | None, year: int | None) -> None:
        """The process before, if any, has ended. ``first_stamp`` and ``year`` are those of the log."""
        self._before = self.spent(first_stamp, event.previous, year)
        self._process = _Process(first_stamp=event.stamp)

    def progress(self, event: events.TrainProgress) -> None:
        if self._process.first_progress is None:
            self._process.first_progress = event
        self._process.last_progress = event

    def logged(self, seconds: int) -> None:
        """The time that the process itself reports."""
        self._process.logged_seconds = seconds

    def spent(self, first_stamp: str | None, last_stamp: str | None, year: int | None) -> Spent:
        """Of all processes, up to ``last_stamp``; ``first_stamp`` is used where a process logged no start."""
        process = self._process
        first = process.first_stamp or first_stamp
        seconds = 0.0
        if process.logged_seconds is not None:
            seconds = float(process.logged_seconds)
        elif first is not None and last_stamp is not None:
            seconds = elapsed(first, last_stamp, year)
        begin, end = process.first_progress, process.last_progress
        if begin is None or end is None or end.iteration <= begin.iteration:
            return self._before + Spent(seconds)
        return self._before + Spent(
            seconds, end.iteration - begin.iteration, elapsed(begin.stamp, end.stamp, year)
        )
