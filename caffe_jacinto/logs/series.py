"""The tests of a stage and the time that it took, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from caffe_jacinto.logs import events
from caffe_jacinto.logs.events import elapsed


@dataclass
class NetTests:
    """The outputs of one test net: of the test being printed, and of the complete one before it."""

    current: dict[int, events.TestOutput] = field(default_factory=dict)
    ended: bool = False
    """Whether a later line of the solver shows that ``current`` has all its outputs."""
    whole: dict[int, events.TestOutput] = field(default_factory=dict)
    expected: int | None = None

    def start(self, expected: int | None) -> None:
        if self.current:
            self.whole = self.last(None)
        self.current, self.ended, self.expected = {}, False, expected

    def last(self, net_outputs: int | None) -> dict[int, events.TestOutput]:
        """The last test that has all its outputs."""
        # A blob can print several numbers, so an earlier test is a better guide than the network.
        needed = self.expected or len(self.whole) or net_outputs or 1
        return self.current if self.current and (self.ended or len(self.current) >= needed) else self.whole


@dataclass(frozen=True)
class SolverTest:
    """A complete test of the solver."""

    outputs: dict[str, float]
    top1: float | None
    """By the printed test network's Accuracy layer."""
    recalibrated: bool
    """Whether the batch-norm statistics were recalibrated for it: running ones can lag far behind."""


def by_name(outputs: dict[int, events.TestOutput]) -> dict[str, float]:
    """Values by name; further numbers of one blob as ``name[1]``, ``name[2]``."""
    found: dict[str, float] = {}
    seen: dict[str, int] = {}
    for _, output in sorted(outputs.items()):
        times = seen.get(output.name, 0)
        found[f"{output.name}[{times}]" if times else output.name] = output.value
        seen[output.name] = times + 1
    return found


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
