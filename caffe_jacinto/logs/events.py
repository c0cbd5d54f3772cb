"""Caffe's log lines -> events, as the log grows.

Reads what stock Caffe 1.0, NVCaffe 0.16/0.17 and caffe-jacinto print through glog:

    I0815 09:52:55.512455  8764 solver.cpp:363] message        (glog before 0.6: no year)
    I20260815 09:52:55.512455  8764 solver.cpp:363] message    (glog 0.6 and later)

Lines come from several threads and may stand between each other; a process that was killed leaves a cut
line, and the next one starts in the middle of it. A line counts once its end is there: the events of a
log that is cut anywhere are the first of the events of the whole log.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

from caffe_jacinto.errors import UserError
from caffe_jacinto.prototxt import tree

NUMBER = rb"[-+]?(?:nan|inf|\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)"


class ProcessStarted(NamedTuple):
    """A Caffe process began here; a log of a resumed stage holds several."""

    stamp: str
    """When: glog's date and time, e.g. ``0815 09:52:55.512455``; see `logs.clock`."""
    previous: str | None
    """The stamp of the line before, the last that the process before it printed."""


class Version(NamedTuple):
    """What Caffe says it is, e.g. ``NVCaffe 0.16.3``. Stock Caffe 1.0 does not say."""

    text: str
    year: int | None


class GpusUsed(NamedTuple):
    """Devices of a run; none is the CPU."""

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
    """The shape (batch, channels, height, width) that a data layer of the network above gives."""

    shape: tuple[int, ...]
    thread: int


class TrainingBegan(NamedTuple):
    """The solver is set up and begins to iterate."""


class Restored(NamedTuple):
    """The solver state or weights that the process starts from."""

    path: str


class TrainProgress(NamedTuple):
    """A line of training: the iteration, its (smoothed) loss and the speed since the line before."""

    iteration: int
    loss: float
    iters_per_second: float | None
    stamp: str


class LearningRate(NamedTuple):
    """The learning rate at an iteration."""

    iteration: int
    lr: float


class TestStarted(NamedTuple):
    """A test of test net number ``net`` begins."""

    iteration: int
    net: int


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


class TestPlanned(NamedTuple):
    """``caffe test`` will run this many batches."""

    batches: int


class BatchTested(NamedTuple):
    """``caffe test`` has done the batch of this number (from 0)."""

    batch: int


class TestLoss(NamedTuple):
    """``caffe test`` is through: its loss, and how many outputs each batch had (0: not known)."""

    loss: float
    outputs: int


class Sparsity(NamedTuple):
    """A listing of sparsity: zeros and weights in all, and the fraction of zeros by blob (three digits).

    ``blobs`` is keyed by (layer, number of the blob in it).
    """

    total: float
    zeros: float
    weights: float
    blobs: dict[tuple[str, int], float]


class SnapshotWritten(NamedTuple):
    """Caffe began to write this file (``.caffemodel`` or ``.solverstate``, ``.h5`` after them or not)."""

    path: str


class SpeedReported(NamedTuple):
    """NVCaffe's own closing figure, images/s without ``iter_size``; of one GPU or of all."""

    images_per_second: float
    overall: bool


class StoppedEarly(NamedTuple):
    """Training or a test was interrupted by a signal."""


class Finished(NamedTuple):
    """``Optimization Done``: also printed after an interruption. Seconds where the line says them."""

    seconds: int | None


class Fatal(NamedTuple):
    """Caffe gave up; its own words."""

    text: str


Event: TypeAlias = (
    ProcessStarted
    | Version
    | GpusUsed
    | SolverStarted
    | NetPrinted
    | DataShape
    | TrainingBegan
    | Restored
    | TrainProgress
    | LearningRate
    | TestStarted
    | TestOutput
    | TestPlanned
    | BatchTested
    | TestLoss
    | Sparsity
    | SnapshotWritten
    | SpeedReported
    | StoppedEarly
    | Finished
    | Fatal
)

_PREFIX = re.compile(rb"[IWEF](?:\d{4}|\d{8}) \d\d:\d\d:\d\d\.\d{6} +(\d+) ([\w.+-]+):\d+\] ")
_CAFFE_SOURCES = re.compile(
    rb"(?:_?caffe|solver|sgd_solver|net|parallel|common|upgrade_proto|io|layer_factory|math_functions|syncedmem|"
    rb"signal_handler|db_lmdb|\w+_layer|\w+_solver)\.(?:cpp|hpp|cu)$"
)
_ITERATION = re.compile(
    rb"Iteration (\d+)(?:(?: \((?:([^ ()]+) iter/s, )?[^()]*\))?, (?:[\d./]+ep, )?loss = (%b)"
    rb"|, lr = (%b)(?:, \w+ = %b)*|, Testing net \(#(\d+)\))$" % (NUMBER, NUMBER, NUMBER)
)
_TEST_OUTPUT = re.compile(
    rb"    Test net output #(\d+): (.*) = (%b)(?: \(\* %b = (%b) loss\))?$" % (NUMBER, NUMBER, NUMBER)
)
_TEST_RESULT = re.compile(rb"(.*) = (%b)(?: \(\* %b = (%b) loss\))?$" % (NUMBER, NUMBER, NUMBER))
_MARK = re.compile(
    rb"This is \S*[Cc]affe\S* \d|Use CPU\.$|Using GPUs \d|Use GPU with device ID \d"
    rb"|Initializing solver from parameters:"
)
"""What only a process that has just started says."""

_VERSION = re.compile(rb"This is (\S*[Cc]affe\S* \d[\w.+-]*)(?: .*)?$")
_STARTED = re.compile(rb" started at .* (\d{4})$")
_SPEED = re.compile(
    rb" *(Root |Overall multi-GPU |Overall )?(?:Solver )?performance(?: on device \d+)?: "
    rb"(?:.* = )?(%b) img/sec(?: \(.*\))?$" % NUMBER
)
_DONE = re.compile(rb"Optimization Done(?:\.| in(?: (\d+)d)?(?: (\d+)h)?(?: (\d+)m)?(?: (\d+)s)?)$")
_PARAMETER = re.compile(rb"(.+)_param_(\d+)\((%b)\)$" % NUMBER)
_TOTAL = re.compile(
    rb"Total Sparsity \(zero_weights/count\) = +\((%b)/(%b)\) (%b)$" % (NUMBER, NUMBER, NUMBER)
)
_SHAPE = re.compile(rb"(?:\(\d+\) )?[Oo]utput data size: ([\d, ]+)$")
_BATCH = re.compile(rb"Batch (\d+), .* = %b$" % NUMBER)
_PROTO_LINE = re.compile(rb"\s*(?:\}|\w+ \{|\w+: \S.*)$")
_CLOSED = re.compile(rb"(?:\)|Done\.)$")

_BRACKET = ord(")")
"""Ends a line that announces a test, and no other line of an iteration."""

_GLOG_LIMIT = 29_990
"""glog cuts a message at 30,000 characters, its prefix counted."""
_TEXT_LIMIT = 4_000_000
_LINE_LIMIT = 1_000_000
"""Longer lines are no log lines: they are dropped, so that memory does not grow with them."""


class LogReader:
    """Takes a log in pieces of any size and gives the events that have become whole.

    With ``skim``, several times as fast, it leaves out events of which a summary needs only the ends:
    learning rates, and lines of training with further ones on both sides.
    """

    def __init__(self, *, skim: bool = False) -> None:
        self._skim = skim
        self.is_caffe = False
        """Whether a line of Caffe's has been seen."""
        self.first_stamp: str | None = None
        self.last_stamp: str | None = None
        """glog's date and time of the first and last whole line."""
        self.header_year: int | None = None
        """The year in the heading of a log file that glog wrote itself."""
        self._tail = b""
        self._last_line = b""
        self._events: list[Event] = []
        self._texts: dict[int, tuple[bytes, list[bytes], int]] = {}
        self._text_thread: int | None = None
        self._listings: dict[int, dict[tuple[str, int], float]] = {}
        self._results: dict[int, int] = {}
        self._start_rank: int | None = None
        self._test = (0, 0)
        self._batch = -1
        self._batch_outputs = 0
        self._first_batch = -1
        self._complaint = ""

    def feed(self, data: bytes) -> list[Event]:
        """The events that ``data``, the next piece of the log, completes."""
        lines = (self._tail + data).split(b"\n")
        self._tail = lines.pop()
        if len(self._tail) > _LINE_LIMIT:
            self._tail = self._tail[-1000:]
        if self._skim:
            self._read(self._ends(lines))
        else:
            self._note_first(lines)
            self._read(lines)
        return self._take()

    def close(self) -> list[Event]:
        """The log has ended: the event of its last line, if that line is surely whole without its end."""
        if _CLOSED.search(self._tail.rstrip()):
            self._note_first([self._tail])
            self._read([self._tail])
        self._tail = b""
        return self._take()

    def _take(self) -> list[Event]:
        if self._last_line:
            self.last_stamp = _stamp(self._last_line)
        events, self._events = self._events, []
        if events:
            self.is_caffe = True
        return events

    def _ends(self, lines: list[bytes]) -> Iterator[bytes]:
        """The lines without those that `skim` leaves out."""
        self._note_first(lines)
        first, waiting, last = True, b"", b""
        for line in lines:
            parts = line.split(b"] ")
            # A third part is of another line, which began where this one was cut.
            if len(parts) == 2:
                message = parts[1]
                key = message[:9]
                if key == b"Iteration" and message[-1] != _BRACKET:
                    last = line
                    if message.find(b"lr = ", 11, 30) < 0:
                        if first:
                            first = False
                            yield line
                        else:
                            waiting = line
                    continue
                if key == b"    Train":
                    last = line
                    continue
            if waiting:
                yield waiting
            self._note_last(last)
            first, waiting, last = True, b"", b""
            yield line
        if waiting:
            yield waiting
        self._note_last(last)

    def _note_last(self, line: bytes) -> None:
        if _PREFIX.match(line):
            self._last_line = line

    def _note_first(self, lines: list[bytes]) -> None:
        if self.first_stamp is None:
            found = next((match for match in map(_PREFIX.search, lines) if match is not None), None)
            self.first_stamp = _stamp(found.group()) if found is not None else None

    def _read(self, lines: Iterable[bytes]) -> None:
        """The fast path: lines of training, which are nearly all of a long log."""
        append = self._events.append
        iteration_line, output_line = _ITERATION.match, _TEST_OUTPUT.match
        for line in lines:
            start = line.find(b"] ") + 2
            if start < 2 or line[0] not in b"IWEF":
                self._odd_line(line)
                continue
            key = line[start : start + 4]
            if key == b"Iter" and not self._texts and not self._results:
                match = iteration_line(line, start)
                if match is not None:
                    self._last_line = line
                    number, speed, loss, rate, net = match.groups()
                    if loss is not None:
                        append(TrainProgress(int(number), float(loss), _positive(speed), _stamp(line)))
                    elif rate is not None:
                        append(LearningRate(int(number), float(rate)))
                    else:
                        self._test = (int(number), int(net))
                        append(TestStarted(*self._test))
                    continue
            elif key == b"    " and not self._texts and line.find(b"] ", start) < 0:
                if line.startswith(b"Train", start + 4):
                    self._last_line = line
                    continue
                match = output_line(line, start)
                if match is not None:
                    self._last_line = line
                    self._add_output(match)
                    continue
            self._glog_line(line)

    def _odd_line(self, line: bytes) -> None:
        """A line that does not begin as glog's do: printed text, or the rest of a cut line."""
        match = _PREFIX.search(line)
        if match is not None:
            self._text_line(line[: match.start()])
            self._glog_line(line[match.start() :])
            return
        self._text_line(line)

    def _text_line(self, line: bytes) -> None:
        line = line.rstrip()
        if line.startswith(b"[libprotobuf ERROR"):
            self._complaint = _text(line.partition(b"] ")[2])
        elif self.header_year is None and line.startswith(b"Log file created at: "):
            year = line[21:25]
            self.header_year = int(year) if year.isdigit() else None
        if self._text_thread in self._texts and _PROTO_LINE.match(line):
            what, parts, size = self._texts[self._text_thread]
            if size < _TEXT_LIMIT:
                parts.append(line)
                self._texts[self._text_thread] = (what, parts, size + len(line) + 1)

    def _glog_line(self, line: bytes) -> None:
        """Any line with glog's prefix, at its start or, after a cut line, further in."""
        prefix = _PREFIX.match(line)
        if prefix is None:
            self._odd_line(line)
            return
        inner = _PREFIX.search(line, prefix.end()) if b"] " in line[prefix.end() :] else None
        if inner is not None:
            cut = line[: inner.start()]
            if _CLOSED.search(cut):
                self._message(cut, prefix)
            self._glog_line(line[inner.start() :])
            return
        self._message(line, prefix)

    def _message(self, line: bytes, prefix: re.Match[bytes]) -> None:
        thread = int(prefix.group(1))
        if not self.is_caffe and _CAFFE_SOURCES.match(prefix.group(2)):
            self.is_caffe = True
        message = line[prefix.end() :].rstrip()
        if thread in self._texts:
            if _MARK.match(message):
                del self._texts[thread]  # a process that was killed left it unfinished
            else:
                self._close_text(thread)
        if line[:1] == b"F":
            self._fatal(message)
        elif not (thread in self._listings and self._listed(thread, message)) and not (
            thread in self._results and self._result(thread, message)
        ):
            if message[:1] == b"[":
                message = message.partition(b"] ")[2]
            handler = _HANDLERS.get(message[:4])
            if handler is not None:
                handler(self, line, message, thread)
        self._last_line = line

    def _close_text(self, thread: int) -> None:
        """A thread's next line ends the text that it was printing."""
        what, parts, size = self._texts.pop(thread)
        if self._text_thread == thread:
            self._text_thread = None
        text = _text(b"\n".join(parts))
        if what == b"solver":
            try:
                self._events.append(SolverStarted(tree.parse(text, "solver settings in the log")))
            except UserError:
                self._events.append(SolverStarted(tree.Message()))
        else:
            balanced = text.count("{") == text.count("}")
            self._events.append(NetPrinted(text, thread, balanced and not _at_limit(size)))

    def _process_mark(self, line: bytes, rank: int) -> None:
        """Marks of a start come in the order version, devices, solver: one that does not is a new process."""
        if self._start_rank is None or rank <= self._start_rank:
            self._texts.clear()
            self._listings.clear()
            self._results.clear()
            self._text_thread = None
            self._batch = self._first_batch = -1
            self._batch_outputs = 0
            self._complaint = ""
            self._events.append(
                ProcessStarted(_stamp(line), _stamp(self._last_line) if self._last_line else None)
            )
        self._start_rank = rank

    def _version(self, line: bytes, message: bytes, thread: int) -> None:
        match = _VERSION.match(message)
        if match is not None and b"caffe.cpp:" in line[:80]:
            self._process_mark(line, 0)
            started = _STARTED.search(message)
            self._events.append(Version(_text(match.group(1)), int(started.group(1)) if started else None))

    def _devices(self, line: bytes, message: bytes, thread: int) -> None:
        if message == b"Use CPU.":
            ids: tuple[int, ...] = ()
        else:
            match = re.match(rb"(?:Using GPUs|Use GPU with device ID) (\d+(?:, ?\d+)*)$", message)
            if match is None:
                return
            ids = tuple(int(part) for part in match.group(1).split(b","))
        self._process_mark(line, 1)
        self._events.append(GpusUsed(ids))

    def _initializing(self, line: bytes, message: bytes, thread: int) -> None:
        if message.startswith(b"Initializing solver from parameters:"):
            self._process_mark(line, 2)
            what = b"solver"
        elif message.startswith(b"Initializing net from parameters:"):
            what = b"net"
        else:
            return
        self._texts[thread] = (what, [], len(line) + 1)
        self._text_thread = thread

    def _shape(self, line: bytes, message: bytes, thread: int) -> None:
        match = _SHAPE.match(message)
        if match is not None:
            numbers = re.findall(rb"\d+", match.group(1))
            self._events.append(DataShape(tuple(int(number) for number in numbers), thread))

    def _began(self, line: bytes, message: bytes, thread: int) -> None:
        if message in (b"Starting Optimization", b"Starting Optimization."):
            self._events.append(TrainingBegan())

    def _solving(self, line: bytes, message: bytes, thread: int) -> None:
        if message.startswith(b"Solver performance on device"):
            self._speed(line, message, thread)

    def _restored(self, line: bytes, message: bytes, thread: int) -> None:
        match = re.match(
            rb"(?:Resuming from|Finetuning from|Restoring previous solver status from) (.+)$", message
        )
        if match is not None:
            self._events.append(Restored(_text(match.group(1))))

    def _iteration(self, line: bytes, message: bytes, thread: int) -> None:
        match = _ITERATION.match(message)
        if match is None:
            return
        number, speed, loss, rate, net = match.groups()
        if loss is not None:
            self._events.append(TrainProgress(int(number), float(loss), _positive(speed), _stamp(line)))
        elif rate is not None:
            self._events.append(LearningRate(int(number), float(rate)))
        else:
            self._test = (int(number), int(net))
            self._events.append(TestStarted(*self._test))

    def _output(self, line: bytes, message: bytes, thread: int) -> None:
        match = _TEST_OUTPUT.match(message)
        if match is None:
            if message.lstrip().startswith(b"Solver performance"):
                self._speed(line, message, thread)
            return
        self._add_output(match)

    def _add_output(self, match: re.Match[bytes]) -> None:
        index, name, value, loss = match.groups()
        iteration, net = self._test
        self._events.append(
            TestOutput(_text(name), float(value), iteration, net, int(index), _optional(loss))
        )

    def _snapshot(self, line: bytes, message: bytes, thread: int) -> None:
        match = re.match(rb"Snapshotting (?:solver state )?to (?:binary proto|HDF5) file (.+)$", message)
        if match is not None:
            self._events.append(SnapshotWritten(_text(match.group(1))))

    def _listing(self, line: bytes, message: bytes, thread: int) -> None:
        if b"Sparsity (zero_weights/count)" in message:
            self._listings[thread] = {}

    def _listed(self, thread: int, message: bytes) -> bool:
        """A line of a thread that is listing sparsity; False if the line is of another kind."""
        match = _PARAMETER.match(message)
        if match is not None:
            layer, number, fraction = match.groups()
            self._listings[thread][_text(layer), int(number)] = float(fraction)
            return True
        match = _TOTAL.match(message)
        if match is not None:
            zeros, count, total = (float(group) for group in match.groups())
            self._events.append(Sparsity(total, zeros, count, self._listings.pop(thread)))
            return True
        return False

    def _total(self, line: bytes, message: bytes, thread: int) -> None:
        match = _TOTAL.match(message)
        if match is not None:
            zeros, count, total = (float(group) for group in match.groups())
            self._events.append(Sparsity(total, zeros, count, {}))

    def _speed(self, line: bytes, message: bytes, thread: int) -> None:
        match = _SPEED.match(message)
        if match is not None:
            whose = match.group(1) or b""
            # The lines of the further GPUs are indented; the root's, or a single GPU's, are not.
            if whose or not message.startswith(b" "):
                self._events.append(SpeedReported(float(match.group(2)), whose.startswith(b"Overall")))

    def _done(self, line: bytes, message: bytes, thread: int) -> None:
        if message.startswith(b"Optimization stopped early"):
            self._events.append(StoppedEarly())
            return
        match = _DONE.match(message)
        if match is not None:
            days, hours, minutes, seconds = (int(group) if group else None for group in match.groups())
            parts = (days, hours, minutes, seconds)
            known = any(part is not None for part in parts)
            total = sum((part or 0) * unit for part, unit in zip(parts, (86400, 3600, 60, 1), strict=True))
            self._events.append(Finished(total if known else None))

    def _interrupted(self, line: bytes, message: bytes, thread: int) -> None:
        if message == b"Test interrupted.":
            self._events.append(StoppedEarly())

    def _planned(self, line: bytes, message: bytes, thread: int) -> None:
        match = re.match(rb"Running for (\d+) iterations\.$", message)
        if match is not None:
            self._events.append(TestPlanned(int(match.group(1))))

    def _batch_line(self, line: bytes, message: bytes, thread: int) -> None:
        match = _BATCH.match(message)
        if match is None:
            return
        batch = int(match.group(1))
        if self._first_batch < 0:
            self._first_batch = batch
        if batch == self._first_batch:
            self._batch_outputs += 1
        if batch != self._batch:
            self._batch = batch
            self._events.append(BatchTested(batch))

    def _loss(self, line: bytes, message: bytes, thread: int) -> None:
        match = re.match(rb"Loss: (%b)$" % NUMBER, message)
        if match is not None and b"caffe.cpp:" in line[:80]:
            self._events.append(TestLoss(float(match.group(1)), self._batch_outputs))
            self._results[thread] = 0

    def _result(self, thread: int, message: bytes) -> bool:
        """A line of a thread that is printing the results of ``caffe test``; False after the last."""
        match = _TEST_RESULT.match(message)
        if match is None:
            del self._results[thread]
            return False
        name, value, loss = match.groups()
        index = self._results[thread]
        self._results[thread] = index + 1
        self._events.append(TestOutput(_text(name), float(value), None, 0, index, _optional(loss)))
        return True

    def _fatal(self, message: bytes) -> None:
        text = _text(message)
        if self._complaint:
            text = f"{text} ({self._complaint})"
        self._events.append(Fatal(text))


_Handler = Callable[[LogReader, bytes, bytes, int], None]
_HANDLERS: dict[bytes, _Handler] = {
    b"This": LogReader._version,
    b"Usin": LogReader._devices,
    b"Use ": LogReader._devices,
    b"Init": LogReader._initializing,
    b"outp": LogReader._shape,
    b"Outp": LogReader._shape,
    b"(0) ": LogReader._shape,
    b"Star": LogReader._began,
    b"Solv": LogReader._solving,
    b"Resu": LogReader._restored,
    b"Fine": LogReader._restored,
    b"Rest": LogReader._restored,
    b"Iter": LogReader._iteration,
    b"    ": LogReader._output,
    b"Snap": LogReader._snapshot,
    b"Num ": LogReader._listing,
    b"Tota": LogReader._total,
    b"Root": LogReader._speed,
    b"Over": LogReader._speed,
    b"Opti": LogReader._done,
    b"Test": LogReader._interrupted,
    b"Runn": LogReader._planned,
    b"Batc": LogReader._batch_line,
    b"Loss": LogReader._loss,
}


def _at_limit(size: int) -> bool:
    return size >= _GLOG_LIMIT


def _stamp(line: bytes) -> str:
    """glog's date and time of a line, e.g. ``0815 09:52:55.512455`` or ``20260815 09:52:55.512455``."""
    return (line[1:21] if line[5:6] == b" " else line[1:25]).decode("ascii", "replace")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _positive(raw: bytes | None) -> float | None:
    """A speed; stock Caffe prints nonsense (-5e+31 iter/s) before there is one."""
    try:
        value = float(raw) if raw is not None else 0.0
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def _optional(raw: bytes | None) -> float | None:
    return None if raw is None else float(raw)
