"""What a stage's log says so far: how far it is, how good, and whether it goes wrong."""

from __future__ import annotations

import math
import re
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from caffe_jacinto.logs import events
from caffe_jacinto.logs.glog import elapsed
from caffe_jacinto.logs.reader import LogReader

CHUNK = 1 << 20


class Tail:
    """What is appended to a file from byte ``start`` on; the file need not be there yet."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self._path = path
        self._position = start

    def read(self) -> bytes:
        """What is new, up to 1 MiB; empty when nothing is."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read(CHUNK)
        except FileNotFoundError:
            return b""
        self._position += len(data)
        return data


STUCK_LOSS = 87.3365
"""-log of the smallest normal float32: what SoftmaxWithLoss says where every true class has probability 0."""

STUCK_DISPLAYS = 3
"""So many displays in a row at `STUCK_LOSS` are no chance."""

PACE_POINTS = 50
"""Displays that the pace is measured over."""


@dataclass
class StageView:
    """A stage as its log shows it; it is fed the log's bytes as they come."""

    iteration: int = 0
    max_iter: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    sparsity: float | None = None
    """Zeros over weights, as the log last said."""

    tests: dict[int, dict[str, float]] = field(default_factory=dict)
    """The outputs of each test of the solver, by its iteration."""

    final_outputs: dict[str, float] | None = None
    """The results of ``caffe test``."""

    batches: int = 0
    """How many batches ``caffe test`` will score, and has scored."""

    batches_done: int = 0

    written: set[int] = field(default_factory=set)
    """Iterations whose snapshot was begun in this part of the log."""

    fatal: str | None = None
    """Caffe's own words as it gave up."""

    trouble: str | None = None
    """What is wrong with the loss."""

    sound: int = 0
    """The last iteration that was displayed with nothing wrong with its loss."""

    in_test: bool = False
    """A test has begun, and nothing that comes after it has been seen."""

    displays: int = 0
    """How many progress lines have come."""

    def __post_init__(self) -> None:
        self._reader = LogReader()
        self._stuck = 0
        self._pace: deque[tuple[int, str]] = deque(maxlen=PACE_POINTS)

    def feed(self, data: bytes) -> None:
        for event in self._reader.feed(data):
            self._take(event)

    def feed_file(self, path: Path) -> None:
        """Read all that a log holds now; a log that is not there says nothing."""
        tail = Tail(path)
        while data := tail.read():
            self.feed(data)

    def begin_part(self, iteration: int) -> None:
        """A new process goes on at ``iteration``: what the ones before it came to after that is past."""
        self.iteration = self.sound = iteration
        self.tests = {tested: outputs for tested, outputs in self.tests.items() if tested <= iteration}
        self.written.clear()
        self._new_process()

    def seconds_per_iteration(self) -> float | None:
        """Of the last displays, with the tests and snapshots between them."""
        if len(self._pace) < 2:
            return None
        (first, first_stamp), (last, last_stamp) = self._pace[0], self._pace[-1]
        seconds = elapsed(first_stamp, last_stamp)
        return seconds / (last - first) if last > first and seconds > 0 else None

    def top1(self) -> dict[int, float]:
        """Top-1 accuracy by iteration, of the tests that have it."""
        found = {iteration: top1_of(outputs) for iteration, outputs in self.tests.items()}
        return {iteration: value for iteration, value in found.items() if value is not None}

    def _new_process(self) -> None:
        self.fatal = self.trouble = None
        self.in_test = False
        self._stuck = 0
        self._pace.clear()

    def _take(self, event: events.Event) -> None:
        if isinstance(event, events.TestStarted):
            self.in_test = True
        elif not isinstance(event, events.TestOutput):
            self.in_test = False
        match event:
            case events.TrainProgress():
                self._progress(event)
            case events.LearningRate():
                self.learning_rate = event.lr
            case events.TestOutput():
                self._output(event)
            case events.TestPlanned():
                self.batches = event.batches
            case events.BatchTested():
                self.batches_done = event.batch + 1
            case events.Sparsity():
                self.sparsity = event.total
            case events.SnapshotWritten():
                if number := re.search(r"_iter_(\d+)\.", event.path):
                    self.written.add(int(number[1]))
                    self.iteration = max(self.iteration, int(number[1]))
            case events.SolverStarted():
                self.max_iter = event.max_iter
            case events.ProcessStarted():
                self._new_process()
            case events.Fatal():
                self.fatal = self.fatal or event.text
            case _:
                pass

    def _progress(self, event: events.TrainProgress) -> None:
        self.iteration = event.iteration
        self.loss = event.loss
        self.displays += 1
        self._pace.append((event.iteration, event.stamp))
        self._stuck = self._stuck + 1 if abs(event.loss - STUCK_LOSS) < 1e-3 else 0
        if not math.isfinite(event.loss):
            self.trouble = f"the loss is not a number ({event.loss}) at iteration {event.iteration}"
        elif self._stuck >= STUCK_DISPLAYS:
            self.trouble = f"the loss is stuck at {STUCK_LOSS} at iteration {event.iteration}"
        elif not self._stuck:
            self.sound = event.iteration

    def _output(self, event: events.TestOutput) -> None:
        if event.iteration is None:
            self.final_outputs = {**(self.final_outputs or {}), event.name: event.value}
            return
        self.iteration = max(self.iteration, event.iteration)
        self.tests.setdefault(event.iteration, {})[event.name] = event.value
        if event.loss is not None and math.isnan(event.value):
            self.trouble = f"the loss is not a number in the test at iteration {event.iteration}"


def top1_of(outputs: dict[str, float]) -> float | None:
    """The top-1 accuracy among a test's outputs, as the networks name it."""
    return outputs.get("accuracy/top1", outputs.get("accuracy"))
