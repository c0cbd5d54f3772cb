"""Caffe's messages, one at a time -> events.

Caffe prints through glog. Its lines have one of two forms:

I0815 09:52:55.512455  8764 solver.cpp:363] message        (glog before 0.6: no year)
I20260815 09:52:55.512455  8764 solver.cpp:363] message    (glog 0.6 and later)

Several threads print at once. Lines of one printed network or one listing have the same thread number.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.logs.events import (
    BatchTested,
    DataShape,
    Event,
    Fatal,
    Finished,
    GpusUsed,
    LearningRate,
    NetPrinted,
    ProcessStarted,
    Recalibrated,
    Restored,
    SnapshotWritten,
    SolverStarted,
    Sparsity,
    SpeedReported,
    StoppedEarly,
    TestLoss,
    TestOutput,
    TestPlanned,
    TestStarted,
    TrainingBegan,
    TrainProgress,
    Version,
)
from caffe_jacinto.prototxt import tree

PREFIX = re.compile(rb"[IWEF](?:\d{4}|\d{8}) \d\d:\d\d:\d\d\.\d{6} +(\d{1,18}) ([\w.+-]+):\d+\] ")
"""What glog puts before a message; the groups are the thread's number and the source file."""

MESSAGE_LIMIT = 29_990
"""glog cuts a message at 30,000 characters, prefix included."""

# Whole numbers have a limit of digits, and no pattern can match the same text in two ways: no line takes more
# time than others of its length.
NUMBER = rb"[-+]?(?:nan|inf|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+)"
ITERATION = re.compile(
    rb"Iteration (\d{1,18})(?:(?: \((?:([^ ()]+) iter/s, )?[^()]*\))?, (?:[\d./]+ep, )?loss = (%b)"
    rb"|, lr = (%b)(?:, \w+ = %b)*|, Testing net \(#(\d{1,18})\))$" % (NUMBER, NUMBER, NUMBER)
)
TEST_OUTPUT = re.compile(
    rb"    Test net output #(\d{1,18}): (.*) = (%b)(?: \(\* %b = (%b) loss\))?$" % (NUMBER, NUMBER, NUMBER)
)
_TEST_RESULT = re.compile(rb"(.*) = (%b)(?: \(\* %b = (%b) loss\))?$" % (NUMBER, NUMBER, NUMBER))
_MARK = re.compile(
    rb"This is \S{0,99}[Cc]affe\S{0,99} \d|Use CPU\.$|Using GPUs \d|Use GPU with device ID \d"
    rb"|Initializing solver from parameters:"
)
"""Lines that only a process that has just started prints."""

_VERSION = re.compile(rb"This is (\S{0,99}[Cc]affe\S{0,99} \d[\w.+-]*)(?: .*)?$")
_STARTED = re.compile(rb" started at .{1,99} (\d{4})$")
_SPEED = re.compile(
    rb" *(Root |Overall multi-GPU |Overall )?(?:Solver )?performance(?: on device \d+)?: "
    rb"(?:.* = )?(%b) img/sec(?: \([^()]*\))?$" % NUMBER
)
_DONE = re.compile(
    rb"Optimization Done(?:\.| in(?: (\d{1,9})d)?(?: (\d{1,9})h)?(?: (\d{1,9})m)?(?: (\d{1,9})s)?)$"
)
_PARAMETER = re.compile(rb"(.+)_param_(\d{1,18})\((%b)\)$" % NUMBER)
_TOTAL = re.compile(
    rb"Total Sparsity \(zero_weights/count\) = +\((%b)/(%b)\) (%b)$" % (NUMBER, NUMBER, NUMBER)
)
_SHAPE = re.compile(rb"(?:\(\d+\) )?[Oo]utput data size: (\d{1,10}(?:[ ,]+\d{1,10}){0,31})[ ,]*$")
_BATCH = re.compile(rb"Batch (\d{1,18}), .* = %b$" % NUMBER)
_RECALIBRATED = re.compile(
    rb"    Test statistics: recalibrated over (\d{1,18}) batches$"
    rb"|(?:Re-estimating|Recalibrating) the statistics of \d+ batch-norm layers over (\d{1,18}) batches$"
)
_PROTO_LINE = re.compile(rb"\s*(?:\}|\w+ \{|\w+: \S.*)$")

_TEXT_LIMIT = 4_000_000
"""Bytes kept of a printed network or solver."""


def stamp(line: bytes) -> str:
    """Date and time of a line, e.g. ``0815 09:52:55.512455`` or ``20260815 09:52:55.512455``."""
    return (line[1:21] if line[5:6] == b" " else line[1:25]).decode("ascii", "replace")


class MessageReader:
    """Takes the messages of a log in order, and collects the events that they complete."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        """Events that the caller has not taken yet; the caller clears the list."""
        self.header_year: int | None = None
        """The year in the heading of a log file that glog wrote itself."""
        self.texts: dict[int, tuple[bytes, list[bytes], int]] = {}
        """For each thread, the solver or net that it is printing: kind, lines, size in bytes."""
        self.results: dict[int, int] = {}
        """For each thread that prints the results of ``caffe test``, how many it has printed."""
        self._text_thread: int | None = None
        self._listings: dict[int, dict[tuple[str, int], float]] = {}
        self._start_rank: int | None = None
        self._test = (0, 0)
        self._batch = -1
        self._batch_outputs = 0
        self._first_batch = -1
        self._complaint = ""
        self._previous = b""

    def take(self, line: bytes, begin: int, thread: int, previous: bytes) -> None:
        """The message that begins at ``begin`` in ``line``; ``previous`` is the whole line before it."""
        self._previous = previous
        message = line[begin:].rstrip()
        if thread in self.texts:
            if _MARK.match(message):
                del self.texts[thread]  # a process that was killed left it unfinished
            else:
                self._close_text(thread)
        if line[:1] == b"F":
            self._fatal(message)
        elif not (thread in self._listings and self._listed(thread, message)) and not (
            thread in self.results and self._result(thread, message)
        ):
            if message[:1] == b"[":
                message = message.partition(b"] ")[2]
            handler = _HANDLERS.get(message[:4])
            if handler is not None:
                handler(self, line, message, thread)

    def text_line(self, line: bytes) -> None:
        """A line without glog's prefix: part of a text that a thread is printing, or not Caffe's."""
        line = line.rstrip()
        if line.startswith(b"[libprotobuf ERROR"):
            self._complaint = _text(line.partition(b"] ")[2])
        elif self.header_year is None and line.startswith(b"Log file created at: "):
            year = line[21:25]
            self.header_year = int(year) if year.isdigit() else None
        if self._text_thread in self.texts and _PROTO_LINE.match(line):
            what, parts, size = self.texts[self._text_thread]
            if size < _TEXT_LIMIT:
                parts.append(line)
                self.texts[self._text_thread] = (what, parts, size + len(line) + 1)

    def _close_text(self, thread: int) -> None:
        """A thread's next line ends the text that it was printing."""
        what, parts, size = self.texts.pop(thread)
        if self._text_thread == thread:
            self._text_thread = None
        text = _text(b"\n".join(parts))
        if what == b"solver":
            try:
                self.events.append(SolverStarted(tree.parse(text, "solver settings in the log")))
            except UserError:
                self.events.append(SolverStarted(tree.Message()))
        else:
            balanced = text.count("{") == text.count("}")
            self.events.append(NetPrinted(text, thread, balanced and size < MESSAGE_LIMIT))

    def _process_mark(self, line: bytes, rank: int) -> None:
        """A process prints version, devices, solver in this order; a mark out of order is a new process."""
        if self._start_rank is None or rank <= self._start_rank:
            self.texts.clear()
            self._listings.clear()
            self.results.clear()
            self._text_thread = None
            self._batch = self._first_batch = -1
            self._batch_outputs = 0
            self._complaint = ""
            self.events.append(ProcessStarted(stamp(line), stamp(self._previous) if self._previous else None))
        self._start_rank = rank

    def _version(self, line: bytes, message: bytes, thread: int) -> None:
        match = _VERSION.match(message)
        if match is not None and b"caffe.cpp:" in line[:80]:
            self._process_mark(line, 0)
            started = _STARTED.search(message)
            self.events.append(Version(_text(match.group(1)), int(started.group(1)) if started else None))

    def _devices(self, line: bytes, message: bytes, thread: int) -> None:
        if message == b"Use CPU.":
            ids: tuple[int, ...] = ()
        else:
            match = re.match(rb"(?:Using GPUs|Use GPU with device ID) (\d{1,9}(?:, ?\d{1,9})*)$", message)
            if match is None:
                return
            ids = tuple(int(part) for part in match.group(1).split(b","))
        self._process_mark(line, 1)
        self.events.append(GpusUsed(ids))

    def _initializing(self, line: bytes, message: bytes, thread: int) -> None:
        if message.startswith(b"Initializing solver from parameters:"):
            self._process_mark(line, 2)
            what = b"solver"
        elif message.startswith(b"Initializing net from parameters:"):
            what = b"net"
        else:
            return
        self.texts[thread] = (what, [], len(line) + 1)
        self._text_thread = thread

    def _shape(self, line: bytes, message: bytes, thread: int) -> None:
        match = _SHAPE.match(message)
        if match is not None:
            numbers = re.findall(rb"\d+", match.group(1))
            self.events.append(DataShape(tuple(int(number) for number in numbers), thread))

    def _began(self, line: bytes, message: bytes, thread: int) -> None:
        if message in (b"Starting Optimization", b"Starting Optimization."):
            self.events.append(TrainingBegan())

    def _solving(self, line: bytes, message: bytes, thread: int) -> None:
        if message.startswith(b"Solver performance on device"):
            self._speed(line, message, thread)

    def _restored(self, line: bytes, message: bytes, thread: int) -> None:
        match = re.match(
            rb"(?:Resuming from|Finetuning from|Restoring previous solver status from) (.+)$", message
        )
        if match is not None:
            self.events.append(Restored(_text(match.group(1))))

    def _iteration(self, line: bytes, message: bytes, thread: int) -> None:
        match = ITERATION.match(message)
        if match is not None:
            self.add_iteration(match, line)

    def add_iteration(self, match: re.Match[bytes], line: bytes) -> None:
        """``match`` is ITERATION's, in ``line``."""
        number, speed, loss, rate, net = match.groups()
        if loss is not None:
            self.events.append(TrainProgress(int(number), float(loss), _positive(speed), stamp(line)))
        elif rate is not None:
            self.events.append(LearningRate(int(number), float(rate)))
        else:
            self._test = (int(number), int(net))
            self.events.append(TestStarted(*self._test))

    def _output(self, line: bytes, message: bytes, thread: int) -> None:
        match = TEST_OUTPUT.match(message)
        if match is not None:
            self.add_output(match)
        elif message.startswith(b"    Test statistics"):
            self._recalibrated(line, message, thread)
        elif message.lstrip().startswith(b"Solver performance"):
            self._speed(line, message, thread)

    def _recalibrated(self, line: bytes, message: bytes, thread: int) -> None:
        match = _RECALIBRATED.match(message)
        if match is not None:
            test, stage = match.groups()
            self.events.append(Recalibrated(int(test or stage), test is not None))

    def add_output(self, match: re.Match[bytes]) -> None:
        """``match`` is TEST_OUTPUT's."""
        index, name, value, loss = match.groups()
        iteration, net = self._test
        self.events.append(TestOutput(_text(name), float(value), iteration, net, int(index), _optional(loss)))

    def _snapshot(self, line: bytes, message: bytes, thread: int) -> None:
        match = re.match(rb"Snapshotting (?:solver state )?to (?:binary proto|HDF5) file (.+)$", message)
        if match is not None:
            self.events.append(SnapshotWritten(_text(match.group(1))))

    def _listing(self, line: bytes, message: bytes, thread: int) -> None:
        if b"Sparsity (zero_weights/count)" in message:
            self._listings[thread] = {}

    def _listed(self, thread: int, message: bytes) -> bool:
        """Read a line of a thread that is listing sparsity; False if it is not part of the listing."""
        match = _PARAMETER.match(message)
        if match is not None:
            layer, number, fraction = match.groups()
            self._listings[thread][_text(layer), int(number)] = float(fraction)
            return True
        match = _TOTAL.match(message)
        if match is not None:
            zeros, count, total = (float(group) for group in match.groups())
            self.events.append(Sparsity(total, zeros, count, self._listings.pop(thread)))
            return True
        return False

    def _total(self, line: bytes, message: bytes, thread: int) -> None:
        match = _TOTAL.match(message)
        if match is not None:
            zeros, count, total = (float(group) for group in match.groups())
            self.events.append(Sparsity(total, zeros, count, {}))

    def _speed(self, line: bytes, message: bytes, thread: int) -> None:
        match = _SPEED.match(message)
        if match is not None:
            whose = match.group(1) or b""
            # The lines of the further GPUs are indented; the root's, or a single GPU's, are not.
            if whose or not message.startswith(b" "):
                self.events.append(SpeedReported(float(match.group(2)), whose.startswith(b"Overall")))

    def _done(self, line: bytes, message: bytes, thread: int) -> None:
        if message.startswith(b"Optimization stopped early"):
            self.events.append(StoppedEarly())
            return
        match = _DONE.match(message)
        if match is not None:
            days, hours, minutes, seconds = (int(group) if group else None for group in match.groups())
            parts = (days, hours, minutes, seconds)
            known = any(part is not None for part in parts)
            total = sum((part or 0) * unit for part, unit in zip(parts, (86400, 3600, 60, 1), strict=True))
            self.events.append(Finished(total if known else None))

    def _interrupted(self, line: bytes, message: bytes, thread: int) -> None:
        if message == b"Test interrupted.":
            self.events.append(StoppedEarly())

    def _planned(self, line: bytes, message: bytes, thread: int) -> None:
        match = re.match(rb"Running for (\d{1,18}) iterations\.$", message)
        if match is not None:
            self.events.append(TestPlanned(int(match.group(1))))

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
            self.events.append(BatchTested(batch))

    def _loss(self, line: bytes, message: bytes, thread: int) -> None:
        match = re.match(rb"Loss: (%b)$" % NUMBER, message)
        if match is not None and b"caffe.cpp:" in line[:80]:
            self.events.append(TestLoss(float(match.group(1)), self._batch_outputs))
            self.results[thread] = 0

    def _result(self, thread: int, message: bytes) -> bool:
        """Read a line of a thread that prints the results of ``caffe test``; False after the last."""
        match = _TEST_RESULT.match(message)
        if match is None:
            del self.results[thread]
            return False
        name, value, loss = match.groups()
        index = self.results[thread]
        self.results[thread] = index + 1
        self.events.append(TestOutput(_text(name), float(value), None, 0, index, _optional(loss)))
        return True

    def _fatal(self, message: bytes) -> None:
        text = _text(message)
        if self._complaint:
            text = f"{text} ({self._complaint})"
        self.events.append(Fatal(text))


_Handler = Callable[[MessageReader, bytes, bytes, int], None]
_HANDLERS: dict[bytes, _Handler] = {
    b"This": MessageReader._version,
    b"Usin": MessageReader._devices,
    b"Use ": MessageReader._devices,
    b"Init": MessageReader._initializing,
    b"outp": MessageReader._shape,
    b"Outp": MessageReader._shape,
    b"(0) ": MessageReader._shape,
    b"Star": MessageReader._began,
    b"Solv": MessageReader._solving,
    b"Resu": MessageReader._restored,
    b"Re-e": MessageReader._recalibrated,
    b"Reca": MessageReader._recalibrated,
    b"Fine": MessageReader._restored,
    b"Rest": MessageReader._restored,
    b"Iter": MessageReader._iteration,
    b"    ": MessageReader._output,
    b"Snap": MessageReader._snapshot,
    b"Num ": MessageReader._listing,
    b"Tota": MessageReader._total,
    b"Root": MessageReader._speed,
    b"Over": MessageReader._speed,
    b"Opti": MessageReader._done,
    b"Test": MessageReader._interrupted,
    b"Runn": MessageReader._planned,
    b"Batc": MessageReader._batch_line,
    b"Loss": MessageReader._loss,
}


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _positive(raw: bytes | None) -> float | None:
    """A speed. Stock Caffe prints nonsense (-5e+31 iter/s) before it has measured one."""
    try:
        value = float(raw) if raw is not None else 0.0
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def _optional(raw: bytes | None) -> float | None:
    return None if raw is None else float(raw)
