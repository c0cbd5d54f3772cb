"""What a page shows of a stage over time, in bounded memory: curves, the sparsity of each layer, the clock.

A curve with too many points is thinned into buckets of neighbouring points. Each keeps the lowest and the
highest value in it beside the mean, so that no extreme is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from caffe_jacinto.logs import events
from caffe_jacinto.logs.events import elapsed

MOST_BUCKETS = 4000
MOST_LISTINGS = 400
MOST_TIMES = 2000
MOST_OUTPUTS = 100
"""Outputs of test networks that have a curve: a blob of many numbers is an output for each.

As many again of those whose number is lower than this.
"""


class Bucket(NamedTuple):
    """Neighbouring points of a curve: how many, and their values."""

    first: float
    last: float
    """The iterations of the first and the last point."""
    total: float
    low: float
    high: float
    points: int = 1

    @property
    def mean(self) -> float:
        mean = self.total / self.points
        return mean if math.isfinite(mean) else self.low / 2 + self.high / 2  # their sum is too large

    def joined(self, later: Bucket) -> Bucket:
        low, high = min(self.low, later.low), max(self.high, later.high)
        return Bucket(self.first, later.last, self.total + later.total, low, high, self.points + later.points)


class Buckets:
    """A curve, as buckets in the order of their iterations; each holds one point until there are too many."""

    def __init__(self, most: float = MOST_BUCKETS) -> None:
        self._most = most
        self._width = 1
        self._found: list[Bucket] = []

    def add(self, iteration: float, value: float) -> None:
        """Add a point, if it is a number.

        A stage that was resumed goes back: what lies beyond is of the past, and its buckets go.
        """
        found = self._found
        while found and found[-1].last >= iteration:
            found.pop()
        if not math.isfinite(value):
            return
        point = Bucket(iteration, iteration, value, value, value)
        if found and found[-1].points < self._width:
            found[-1] = found[-1].joined(point)
            return
        if len(found) >= self._most:
            self._found = found = thinned(found, len(found) // 2)
            self._width *= 2
        found.append(point)

    def all(self) -> list[Bucket]:
        return self._found

    def points(self) -> list[tuple[float, float]]:
        """The middle of each bucket: iteration and value."""
        return [((bucket.first + bucket.last) / 2, bucket.mean) for bucket in self._found]


def thinned(buckets: list[Bucket], most: int) -> list[Bucket]:
    """The buckets joined with their neighbours, as few together as leave at most ``most``."""
    together = math.ceil(len(buckets) / max(most, 1))
    if together <= 1:
        return list(buckets)
    found = []
    for at in range(0, len(buckets), together):
        bucket = buckets[at]
        for later in buckets[at + 1 : at + together]:
            bucket = bucket.joined(later)
        found.append(bucket)
    return found


class Listing(NamedTuple):
    """The sparsity of each layer's weights at an iteration."""

    iteration: int
    layers: dict[str, float]
    """Fraction of zeros among the weights, by layer, biases left out."""


class _Time(NamedTuple):
    iteration: int
    stamp: str
    process: int


@dataclass
class StageHistory:
    """Takes the events of a stage in order."""

    every_point: bool = False
    """Whether curves and times keep every point, so that memory grows with the log."""
    loss: Buckets = field(init=False)
    learning_rate: Buckets = field(init=False)
    sparsity: Buckets = field(init=False)
    """Of the convolutions that count; see `StageFigures.sparsity`."""
    outputs: dict[str, Buckets] = field(default_factory=dict)
    """The outputs of the solver's tests, named as in `StageFigures.outputs`."""
    losses: set[str] = field(default_factory=set)
    """The outputs that are losses."""
    listings: list[Listing] = field(default_factory=list)
    _waiting: tuple[events.Sparsity, float | None] | None = None
    """A listing whose iteration the next line names, and the sparsity by it."""
    _seen: dict[str, int] = field(default_factory=dict)
    """How many numbers of each output the present test has printed."""
    _times: list[_Time] = field(default_factory=list)
    _apart: int = 1
    """Displays between two of `_times`."""
    _displays: int = 0
    _process: int = 0

    def __post_init__(self) -> None:
        self.loss, self.learning_rate, self.sparsity = self._curve(), self._curve(), self._curve()

    def _curve(self) -> Buckets:
        return Buckets(math.inf) if self.every_point else Buckets()

    def take(self, event: events.Event, sparsity: float | None, nvcaffe: bool) -> None:
        """The next event; ``sparsity`` as of the last listing. ``nvcaffe``: whose log it is."""
        match event:
            case events.TrainProgress():
                self._place_listing(event.iteration)
                self.loss.add(event.iteration, event.loss)
                self._note_time(event.iteration, event.stamp)
            case events.LearningRate():
                self.learning_rate.add(event.iteration, event.lr)
            case events.TestStarted():
                self._place_listing(event.iteration)
                self._note_time(event.iteration, event.stamp)
                self._seen.clear()
            case events.TestOutput():
                # NVCaffe's test at iteration 0 is of one batch only.
                if event.iteration is not None and not (nvcaffe and event.iteration == 0):
                    self._take_output(event, event.iteration)
            case events.Sparsity():
                self._waiting = (event, sparsity)
            case events.ProcessStarted():
                self._process += 1

    def close(self, iteration: int | None) -> None:
        """The log ends here, at ``iteration``: a last listing has no line after it."""
        if iteration is not None:
            self._place_listing(iteration)

    def _take_output(self, event: events.TestOutput, iteration: int) -> None:
        times = self._seen.get(event.name, 0)
        self._seen[event.name] = times + 1
        name = f"{event.name}[{times}]" if times else event.name
        name += f" (#{event.net})" if event.net else ""
        # Average precisions of classes are numbered behind all others, and come before their mean.
        most = MOST_OUTPUTS if event.number >= MOST_OUTPUTS else 2 * MOST_OUTPUTS
        if name not in self.outputs and len(self.outputs) >= most and not self.every_point:
            return
        self.outputs.setdefault(name, self._curve()).add(iteration, event.value)
        if event.loss is not None:
            self.losses.add(name)

    def _place_listing(self, iteration: int) -> None:
        if self._waiting is None:
            return
        (listed, sparsity), self._waiting = self._waiting, None
        if sparsity is not None:
            self.sparsity.add(iteration, sparsity)
        while self.listings and self.listings[-1].iteration >= iteration:
            self.listings.pop()
        blobs = listed.blobs.items()
        layers = {layer: fraction for (layer, blob), fraction in blobs if blob == 0 and 0 <= fraction <= 1}
        self.listings.append(Listing(iteration, layers))
        if len(self.listings) > MOST_LISTINGS:
            del self.listings[1::2]

    def _note_time(self, iteration: int, stamp: str) -> None:
        while self._times and self._times[-1].iteration >= iteration:
            self._times.pop()
        if self._displays % self._apart == 0:
            self._times.append(_Time(iteration, stamp, self._process))
        self._displays += 1
        if len(self._times) > MOST_TIMES and not self.every_point:
            del self._times[1::2]
            self._apart *= 2

    def seconds(self, year: int | None) -> Iterator[tuple[int, float]]:
        """Pairs (iteration, seconds of training until then); the time between processes does not count."""
        spent, before = 0.0, None
        for time in self._times:
            if before is not None and before.process == time.process:
                spent += elapsed(before.stamp, time.stamp, year)
            before = time
            yield time.iteration, spent
