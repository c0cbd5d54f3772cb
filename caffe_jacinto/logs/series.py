"""What a stage's log says over time, in bounded memory: its tests, the time it took, its curves."""

from __future__ import annotations

from dataclasses import dataclass, field

from caffe_jacinto.logs import events
from caffe_jacinto.logs.events import elapsed

MOST_POINTS = 3000
"""Points that a curve holds."""


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


class Curve:
    """Points (iteration, value) in order; when there are too many, neighbours are averaged pairwise."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []
        self._width = 1
        self._waiting: list[tuple[float, float]] = []

    def add(self, iteration: float, value: float) -> None:
        """Add a point. A stage that was resumed goes back: points from there on are of the past."""
        while self._waiting and self._waiting[-1][0] >= iteration:
            self._waiting.pop()
        if not self._waiting:
            while self.points and self.points[-1][0] >= iteration:
                self.points.pop()
        self._waiting.append((iteration, value))
        if len(self._waiting) >= self._width:
            self.points.append(_mean(self._waiting))
            self._waiting.clear()
        if len(self.points) >= MOST_POINTS:
            self.points = [_mean(self.points[at : at + 2]) for at in range(0, len(self.points), 2)]
            self._width *= 2

    def all(self) -> list[tuple[float, float]]:
        """Every point, the last ones not yet averaged."""
        return [*self.points, *self._waiting]


def _mean(points: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


@dataclass
class StageCurves:
    """What a plot shows of one stage."""

    loss: Curve = field(default_factory=Curve)
    learning_rate: Curve = field(default_factory=Curve)
    top1: Curve = field(default_factory=Curve)
    top5: Curve = field(default_factory=Curve)
    sparsity: Curve = field(default_factory=Curve)
