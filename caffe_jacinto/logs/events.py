"""What the lines of a Caffe log say, as events; and the times at which they were logged."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import NamedTuple, TypeAlias

from caffe_jacinto.prototxt import tree


class ProcessStarted(NamedTuple):
    """A Caffe process began here. The log of a resumed stage holds several."""

    stamp: str
    """When: glog's date and time, e.g. ``0815 09:52:55.512455``; see `moment`."""
    previous: str | None
    """The stamp of the line before: the last line of the process before."""


class Version(NamedTuple):
    """What Caffe says it is, e.g. ``NVCaffe 0.16.3``. Stock Caffe 1.0 does not say."""

    text: str
    year: int | None


class GpusUsed(NamedTuple):
    """The GPUs of a run; none means the CPU."""

    ids: tuple[int, ...]


class SolverStarted(NamedTuple):
    """The solver's settings, as printed."""

    settings: tree.Message

    @property
    def max_iter(self) -> int | None:
        """Iterations of the stage, or None where the solver states none."""
        return self.settings.optional_integer("max_iter")

    @property
    def iter_size(self) -> int:
        """Passes that one update accumulates (1 unless stated)."""
        return max(1, self.settings.integer("iter_size", 1))

    @property
    def snapshot_prefix(self) -> str:
        """Path that the names of snapshots begin with; empty where not stated."""
        return self.settings.string("snapshot_prefix")


class NetPrinted(NamedTuple):
    """A network, as printed when it is set up."""

    text: str
    thread: int
    complete: bool
    """False where glog cut the message at its limit of 30,000 characters."""


class DataShape(NamedTuple):
    """The output shape (batch, channels, height, width) of a data layer in the network above."""

    shape: tuple[int, ...]
    thread: int


class TopShape(NamedTuple):
    """The shape of an output of a layer in the network above; ``layer`` is None where the log names none."""

    shape: tuple[int, ...]
    thread: int
    layer: str | None


class DataSize(NamedTuple):
    """The images that the list of an ImageData layer names."""

    images: int
    thread: int


class TrainingBegan(NamedTuple):
    """The solver is set up and begins to iterate."""


class Restored(NamedTuple):
    """The solver state or weights that the process starts from."""

    path: str

    @property
    def is_state(self) -> bool:
        """Whether it is a solver state, so that the training goes on with the iteration after it."""
        return "solverstate" in self.path


class TrainProgress(NamedTuple):
    """A line of training: the iteration, its (smoothed) loss and the speed since the line before."""

    iteration: int
    loss: float
    iters_per_second: float | None
    stamp: str
    epochs: float | None = None
    """Passes over the training data until then, which NVCaffe prints."""


class LearningRate(NamedTuple):
    """The learning rate at an iteration."""

    iteration: int
    lr: float


class TestStarted(NamedTuple):
    """A test of test net number ``net`` begins."""

    iteration: int
    net: int
    stamp: str


class TestOutput(NamedTuple):
    """One number of a test: of a solver's test, or of ``caffe test`` (iteration None)."""

    name: str
    value: float
    iteration: int | None
    net: int
    number: int
    """Its number among the outputs of its network."""
    loss: float | None
    """The value times its loss weight, where it is a loss."""
    mean_ap: bool = False
    """Whether it is a detector's mean average precision."""


class Evaluated(NamedTuple):
    """A detector's precision over a data set, which py-faster-rcnn computes itself."""

    mean_ap: float
    class_ap: tuple[tuple[str, float], ...]
    """Average precision, by the class's name."""
    images: int
    """How many images were tested; 0 if the log does not say."""


class TestScore(NamedTuple):
    """One number of a solver's test in a log of 2014, which does not name it."""

    number: int
    """Its number among the outputs of its network, which Caffe orders by name."""
    value: float
    iteration: int
    net: int


class Recalibrated(NamedTuple):
    """Batch-norm statistics were recalibrated over so many training batches.

    ``this_test``: a copy of them, for the test that has just begun. Otherwise the network's own, at the end
    of its stage, and later tests of the process show them.
    """

    batches: int
    this_test: bool


class Quantizing(NamedTuple):
    """Our quantize command has done ``done`` of ``total`` images of ``what`` (calibrate, sensitivity)."""

    what: str
    done: int
    total: int


class FloatOutput(NamedTuple):
    """One number of the test of the network that our quantize command quantizes, before that."""

    name: str
    value: float


class TestPlanned(NamedTuple):
    """``caffe test`` will run this many batches."""

    batches: int


class BatchTested(NamedTuple):
    """``caffe test`` has done the batch of this number (from 0)."""

    batch: int


class TestLoss(NamedTuple):
    """``caffe test`` is done: its loss, and how many outputs each batch had (0: unknown)."""

    loss: float
    outputs: int


class Benchmarked(NamedTuple):
    """A time that ``caffe time`` measured, in milliseconds; with an empty name, it begins to measure."""

    name: str
    milliseconds: float


class Sparsity(NamedTuple):
    """A listing of sparsity: all zeros, all weights, and the fraction of zeros of each blob (three digits).

    ``blobs`` is keyed by (layer, number of the blob in it).
    """

    total: float
    zeros: float
    weights: float
    blobs: dict[tuple[str, int], float]
    inner_products: bool = False
    """Whether the line says that these are inner products, too (our own programs, where they prune them)."""


class SnapshotWritten(NamedTuple):
    """Caffe began to write this file: ``.caffemodel`` or ``.solverstate``, perhaps with ``.h5`` appended."""

    path: str


class SpeedReported(NamedTuple):
    """NVCaffe's own final figure, in images/s without ``iter_size``, for one GPU or ``overall``."""

    images_per_second: float
    overall: bool


class StoppedEarly(NamedTuple):
    """Training or a test was interrupted by a signal."""


class Finished(NamedTuple):
    """``Optimization Done``, also printed after an interruption; with seconds if the line has them."""

    seconds: int | None


class Fatal(NamedTuple):
    """Caffe gave up, with this message."""

    text: str


Event: TypeAlias = (
    ProcessStarted
    | Version
    | GpusUsed
    | SolverStarted
    | NetPrinted
    | DataShape
    | TopShape
    | DataSize
    | TrainingBegan
    | Restored
    | TrainProgress
    | LearningRate
    | TestStarted
    | TestOutput
    | Evaluated
    | TestScore
    | Recalibrated
    | Quantizing
    | FloatOutput
    | TestPlanned
    | BatchTested
    | TestLoss
    | Benchmarked
    | Sparsity
    | SnapshotWritten
    | SpeedReported
    | StoppedEarly
    | Finished
    | Fatal
)


_LEAP_YEAR = 2016
"""Used where the year is unknown: 29 February must be a valid date."""

_STAMP = re.compile(r"(\d{4})?(\d\d)(\d\d) (\d\d):(\d\d):(\d\d)\.(\d{6})", re.ASCII)


def moment(stamp: str, year: int | None = None) -> datetime | None:
    """The stamp as a date and time, with ``year`` where the stamp has none. None if it is not a date."""
    match = _STAMP.fullmatch(stamp)
    if match is None:
        return None
    own_year, *others = match.groups()
    month, day, hour, minute, second, microsecond = map(int, others)
    try:
        return datetime(int(own_year or year or _LEAP_YEAR), month, day, hour, minute, second, microsecond)
    except ValueError:
        return moment(f"{_LEAP_YEAR}{stamp}") if (month, day) == (2, 29) and not own_year else None


def elapsed(first: str, last: str, year: int | None = None) -> float:
    """Seconds from one stamp of a process to a later one; ``year`` is that of the first, if known.

    Stamps without a year may cross New Year. A clock that was set back a little counts as no time.
    """
    start = moment(first, year)
    if start is None:
        return 0.0
    end = moment(last, start.year)
    if end is None:
        return 0.0
    if end < start - timedelta(days=1):
        end = moment(last, start.year + 1) or end
    return max(0.0, (end - start).total_seconds())
