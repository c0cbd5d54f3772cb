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
    Benchmarked,
    DataShape,
    DataSize,
    Evaluated,
    Event,
    Fatal,
    Finished,
    FloatOutput,
    GpusUsed,
    LearningRate,
    NetPrinted,
    ProcessStarted,
    Quantizing,
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
    TestScore,
    TestStarted,
    TopShape,
    TrainingBegan,
    TrainProgress,
    Version,
)
from caffe_jacinto.prototxt import tree

MESSAGE_LIMIT = 29_990
"""glog cuts a message at 30,000 characters, prefix included."""

# Whole numbers have a limit of digits, and no pattern can match the same text in two ways: no line takes more
# time than others of its length.
NUMBER = rb"[-+]?(?:nan(?:\(\w{1,9}\))?|inf|1\.#[A-Z]{3,4}\d{0,9}|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+)"
"""As C++ prints it, on Windows too: 1.#IND, 1.#QNAN and nan(ind) are not numbers, 1.#INF is infinity."""
ITERATION = re.compile(
    rb"Iteration (\d{1,18})(?: \((?:([^ ()]+(?:\(\w{1,9}\))?) iter/s, )?[^()]*\))?, "
    rb"(?:(?:(\d{1,9}(?:\.\d*)?)/[\d.]+ep, )?loss = (%b)"
    rb"|lr = (%b)(?:, \w+ = %b)*|Testing net(?: \(#(\d{1,18})\))?)$" % (NUMBER, NUMBER, NUMBER)
)
TEST_OUTPUT = re.compile(
    rb" {0,8}Test net output #(\d{1,18}): (.*) = (%b)(?: \(\* %b = (%b) loss\))?$" % (NUMBER, NUMBER, NUMBER)
)
_BEFORE_DEVICE = (b" ", b"[", b"(")
DEVICE = re.compile(rb" {0,8}([\[(])([\w.]{1,20})[\])](?= )")
"""The device before a message of NVCaffe's, in square brackets for training and in round ones for tests."""
_MARK = re.compile(
    rb"This is \S{0,99}[Cc]affe\S{0,99} \d|Use CPU\.$|Using GPUs \d|Use GPU with device ID \d"
    rb"|Initializing solver from parameters:"
)
"""Lines that only a process that has just started prints."""

_STARTS = re.compile(rb" (?:caffe|upgrade_proto|io|common|solver_factory)\.[ch]pp:")
"""What a process runs first, in its main thread."""
_GAVE_UP = 9
"""After any mark of a process."""

_VERSION = re.compile(rb"This is (\S{0,99}[Cc]affe\S{0,99} \d[\w.+-]*)(?: .*)?$")
_SHAPE = re.compile(rb"[Oo]utput data size: (\d{1,10}(?:[ ,]+\d{1,10}){0,31})[ ,]*$")
_TOP_SHAPE = re.compile(
    rb"(?:(?:TRAIN|TEST) )?Top shape(?: for layer \d{1,9} '(.{1,200})')?:? "
    rb"(\d{1,10}(?: \d{1,10}){0,31}) \(\d{1,18}\)$"
)
_SETTING_UP = re.compile(rb"Setting up (\S{1,200})$")
_DATA_SIZE = re.compile(rb"A total of (\d{1,18}) images\.$")
_BATCH = re.compile(rb"Batch (\d{1,18}), .* = %b$" % NUMBER)
_WROTE = re.compile(rb"Wrote snapshot to:? (\S.*)$")
_PROTO_LINE = re.compile(rb"\s*(?:\}|\w+ \{|\w+: \S.*)$")

# Rare messages: these patterns are compiled when one comes.
_TEST_RESULT = rb"(.*) = (%b)(?: \(\* %b = (%b) loss\))?$" % (NUMBER, NUMBER, NUMBER)
_SPEED = (
    rb" *(Root |Overall multi-GPU |Overall )?(?:Solver )?performance(?: on device \d+)?: "
    rb"(?:.* = )?(%b) img/sec(?: \([^()]*\))?$" % NUMBER
)
_DONE = rb"Optimization Done(?:\.| in(?: (\d{1,9})d)?(?: (\d{1,9})h)?(?: (\d{1,9})m)?(?: (\d{1,9})s)?)$"
_PARAMETER = rb"(.+)_param_(\d{1,18})\((%b)\)$" % NUMBER
_TOTAL = rb"Total Sparsity \(zero_weights/count\) = +\((%b)/(%b)\) (%b)$" % (NUMBER, NUMBER, NUMBER)
_SCORE = rb"Test score #(\d{1,18}): (%b)$" % NUMBER
_MEAN_AP = rb" {0,8}Test net output mAP #(\d{1,9}): (.{1,200}) = (%b)$" % NUMBER
_EVALUATED = re.compile(rb"(?:AP for (\S.{0,199}?)|Mean AP) = (%b)$" % NUMBER)
_DETECTED = re.compile(rb"im_detect: (\d{1,9})/(\d{1,9}) ")
"""Lines that py-faster-rcnn prints when it tests a network, without glog."""
_CLASS_AP = rb"class(?: AP )?(\d{1,9}): (%b)$" % NUMBER
_BENCHMARK = (
    rb"(Average Forward pass|Average Backward pass|Average Forward-Backward|Total Time): (%b) ms\.$" % NUMBER
)
_RECALIBRATED = (
    rb"    Test statistics: recalibrated over (\d{1,18}) batches$"
    rb"|(?:Re-estimating|Recalibrating) the statistics of \d+ batch-norm layers over (\d{1,18}) batches$"
)
_QUANTIZING = rb"Quantizing: (\w{1,20}), (\d{1,18}) of (\d{1,18}) images$"
_FLOAT = rb"Float network: (.*) = (%b)$" % NUMBER
_STARTED = rb" started at .{1,99} (\d{4})$"

_MOST_CLASSES = 10_000
_CLASS_OUTPUTS = 1_000_000
"""The average precision of class n is numbered from here on among a test's outputs."""

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
        self._lists_inner_products = False
        self._start_rank: int | None = None
        self._test = (0, 0)
        self._batch = -1
        self._batch_outputs = 0
        self._first_batch = -1
        self._complaint = ""
        self._previous = b""
        self._layers: dict[int, str] = {}
        """For each thread, the layer that it is setting up."""
        self._run: tuple[int, bytes, bytes] | None = None
        """The thread that the last messages are of, the first of them, and the line before that."""
        self._notices: tuple[bytes, bytes, bytes] | None = None
        """Of consecutive notices about old forms: the first, the line before it, the last."""
        self._precisions: dict[str, float] = {}
        """Average precisions of an evaluation whose mean has not been printed."""
        self._detected = 0
        """The images of the last line about detection."""
        self._main = -1
        """The thread that printed the first lines of the present process."""
        self._has_device = False
        """Whether the present process has said which it uses."""
        self._began_training = False
        self._roots: dict[bytes, bytes] = {}
        """The device whose lines count, of those that print the same: the first, by its kind of bracket."""

    def take(self, line: bytes, begin: int, thread: int, previous: bytes) -> None:
        """The message that begins at ``begin`` in ``line``; ``previous`` is the whole line before it."""
        self._previous = previous
        self._note_run(line, thread, previous)
        message = line[begin:].rstrip()
        if thread in self.texts:
            if _MARK.match(message):
                del self.texts[thread]  # a process that was killed left it unfinished
            else:
                self._close_text(thread)
        if line[:1] == b"F":
            self._fatal(line, message, thread)
        elif not (thread in self._listings and self._listed(thread, message)) and not (
            thread in self.results and self._result(thread, message)
        ):
            device = DEVICE.match(message) if message[:1] in _BEFORE_DEVICE else None
            if device is not None:
                message = message[device.end() :]
                message = message if message[:4] == b"    " else message.lstrip()
                if not self._is_root(device, message):
                    return
            handler = _HANDLERS.get(message[:4])
            if handler is not None:
                handler(self, line, message, thread)

    def _is_root(self, device: re.Match[bytes], message: bytes) -> bool:
        """Whether a message counts: of those that every device prints alike, only the first device's do."""
        if not message.startswith((b"Iteration ", b"    Test net output ")):
            return True
        bracket, name = device.groups()
        return self._roots.setdefault(bracket, name) == name

    def _note_run(self, line: bytes, thread: int, previous: bytes) -> None:
        if self._run is None or self._run[0] != thread:
            self._run = (thread, line, previous)
        if b" upgrade_proto.cpp:" in line[:80]:
            follows = self._notices is not None and self._notices[2] is previous
            first, before = self._notices[:2] if self._notices is not None and follows else (line, previous)
            self._notices = (first, before, line)

    def text_line(self, line: bytes) -> None:
        """A line without glog's prefix: part of a text that a thread is printing, or not Caffe's."""
        line = line.rstrip()
        if line.startswith(b"[libprotobuf ERROR"):
            self._complaint = _text(line.partition(b"] ")[2])
        elif line == b"done solving":  # py-faster-rcnn
            self.events.append(Finished(None))
        elif (wrote := _WROTE.match(line)) is not None:
            self.events.append(SnapshotWritten(_text(wrote.group(1))))
        elif line.startswith((b"AP for ", b"Mean AP = ")):
            self._evaluation(line)
        elif (detected := _DETECTED.match(line)) is not None:
            self._detected = int(detected.group(2))
        elif self.header_year is None and line.startswith(b"Log file created at: "):
            year = line[21:25]
            self.header_year = int(year) if year.isdigit() else None
        if self._text_thread in self.texts and _PROTO_LINE.match(line):
            what, parts, size = self.texts[self._text_thread]
            if size < _TEXT_LIMIT:
                parts.append(line)
                self.texts[self._text_thread] = (what, parts, size + len(line) + 1)

    def _evaluation(self, line: bytes) -> None:
        match = _EVALUATED.match(line)
        if match is None:
            return
        name, value = match.groups()
        if name is None:
            found = tuple(self._precisions.items())
            self.events.append(Evaluated(_value(value), found, self._detected))
            self._precisions.clear()
        elif len(self._precisions) < _MOST_CLASSES:
            self._precisions[_text(name)] = _value(value)

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

    def _process_mark(self, line: bytes, rank: int, thread: int) -> None:
        """A process prints version, devices, solver in this order; a mark out of order is a new process."""
        if self._start_rank is None or rank <= self._start_rank:
            self._start_process(line, thread)
        self._start_rank = rank

    def _start_process(self, line: bytes, thread: int) -> None:
        """A process has printed ``line``, perhaps after notices, which do not say that they are its first."""
        first, before = line, self._previous
        if self._run is not None and thread != self._main:
            _, first, before = self._run
        elif self._notices is not None and self._notices[2] is self._previous:
            first, before, _ = self._notices
        self.texts.clear()
        self._listings.clear()
        self.results.clear()
        self._text_thread = None
        self._batch = self._first_batch = -1
        self._batch_outputs = 0
        self._complaint = ""
        self._layers.clear()
        self._roots.clear()
        self._main = thread
        self._has_device = False
        self._began_training = False
        self.events.append(ProcessStarted(stamp(first), stamp(before) if before else None))

    def _version(self, line: bytes, message: bytes, thread: int) -> None:
        match = _VERSION.match(message)
        if match is not None and b"caffe.cpp:" in line[:80]:
            self._process_mark(line, 0, thread)
            started = re.search(_STARTED, message)
            self.events.append(Version(_text(match.group(1)), int(started.group(1)) if started else None))

    def _devices(self, line: bytes, message: bytes, thread: int) -> None:
        if message == b"Use CPU.":
            ids: tuple[int, ...] = ()
        else:
            match = re.match(rb"(?:Using GPUs|Use GPU with device ID) (\d{1,9}(?:, ?\d{1,9})*)$", message)
            if match is None:
                return
            ids = tuple(int(part) for part in match.group(1).split(b","))
        # Caffe of 2014 chooses the device when its solver is ready.
        is_ready = self._previous.endswith(b"] Solver scaffolding done.") and not self._has_device
        if not (is_ready and thread == self._main):
            self._process_mark(line, 1, thread)
        self._has_device = True
        self.events.append(GpusUsed(ids))

    def _initializing(self, line: bytes, message: bytes, thread: int) -> None:
        if message.startswith(b"Initializing solver from parameters:"):
            self._process_mark(line, 2, thread)
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
            self.events.append(DataShape(_numbers(match.group(1)), thread))

    def _top_shape(self, line: bytes, message: bytes, thread: int) -> None:
        match = _TOP_SHAPE.match(message)
        if match is not None:
            layer = _text(match.group(1)) if match.group(1) else self._layers.get(thread)
            self.events.append(TopShape(_numbers(match.group(2)), thread, layer))

    def _setting_up(self, line: bytes, message: bytes, thread: int) -> None:
        match = _SETTING_UP.match(message)
        if match is not None:
            self._layers[thread] = _text(match.group(1))

    def _data_size(self, line: bytes, message: bytes, thread: int) -> None:
        match = _DATA_SIZE.match(message)
        if match is not None:
            self.events.append(DataSize(int(match.group(1)), thread))

    def _began(self, line: bytes, message: bytes, thread: int) -> None:
        if message in (b"Starting Optimization", b"Starting Optimization."):
            self._began_training = True
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
        number, speed, epochs, loss, rate, net = match.groups()
        if loss is not None:
            done = None if epochs is None else _value(epochs)
            progress = TrainProgress(int(number), _value(loss), _positive(speed), stamp(line), done)
            self.events.append(progress)
        elif rate is not None:
            self.events.append(LearningRate(int(number), _value(rate)))
        else:
            self._test = (int(number), int(net or 0))
            self.events.append(TestStarted(*self._test, stamp(line)))

    def _output(self, line: bytes, message: bytes, thread: int) -> None:
        match = TEST_OUTPUT.match(message)
        if match is not None:
            self.add_output(match)
        elif message.startswith(b"    Test statistics"):
            self._recalibrated(line, message, thread)
        elif message.lstrip().startswith(b"Solver performance"):
            self._speed(line, message, thread)
        elif message.lstrip().startswith(b"Test net output mAP"):
            self._mean_ap(line, message, thread)

    def _mean_ap(self, line: bytes, message: bytes, thread: int) -> None:
        match = re.match(_MEAN_AP, message)
        if match is not None:
            iteration, net = self._test
            number, name, value = match.groups()
            output = TestOutput(_text(name), _value(value), iteration, net, int(number), None, mean_ap=True)
            self.events.append(output)

    def _class_ap(self, line: bytes, message: bytes, thread: int) -> None:
        match = re.match(_CLASS_AP, message)
        if match is not None and b"solver.c" in line[:80]:
            iteration, net = self._test
            number = int(match.group(1))
            name, value = f"class AP {number}", _value(match.group(2))
            self.events.append(TestOutput(name, value, iteration, net, _CLASS_OUTPUTS + number, None))

    def _recalibrated(self, line: bytes, message: bytes, thread: int) -> None:
        match = re.match(_RECALIBRATED, message)
        if match is not None:
            test, stage = match.groups()
            self.events.append(Recalibrated(int(test or stage), test is not None))

    def add_output(self, match: re.Match[bytes]) -> None:
        """``match`` is TEST_OUTPUT's."""
        index, name, value, loss = match.groups()
        iteration, net = self._test
        self.events.append(
            TestOutput(_text(name), _value(value), iteration, net, int(index), _optional(loss))
        )

    def _snapshot(self, line: bytes, message: bytes, thread: int) -> None:
        match = re.match(rb"Snapshotting (?:solver state )?to (?:(?:binary proto|HDF5) file )?(.+)$", message)
        if match is not None:
            self.events.append(SnapshotWritten(_text(match.group(1))))

    def _listing(self, line: bytes, message: bytes, thread: int) -> None:
        if b"Sparsity (zero_weights/count)" in message:
            self._listings[thread] = {}
            self._lists_inner_products = b", inner products included, " in message

    def _listed(self, thread: int, message: bytes) -> bool:
        """Read a line of a thread that is listing sparsity; False if it is not part of the listing."""
        match = re.match(_PARAMETER, message)
        if match is not None:
            layer, number, fraction = match.groups()
            self._listings[thread][_text(layer), int(number)] = _value(fraction)
            return True
        match = re.match(_TOTAL, message)
        if match is not None:
            zeros, count, total = (_value(group) for group in match.groups())
            blobs = self._listings.pop(thread)
            self.events.append(Sparsity(total, zeros, count, blobs, self._lists_inner_products))
            return True
        return False

    def _total(self, line: bytes, message: bytes, thread: int) -> None:
        if message.startswith(b"Total Time: "):
            self._benchmark(line, message, thread)
            return
        match = re.match(_TOTAL, message)
        if match is not None:
            zeros, count, total = (_value(group) for group in match.groups())
            self.events.append(Sparsity(total, zeros, count, {}))

    def _speed(self, line: bytes, message: bytes, thread: int) -> None:
        match = re.match(_SPEED, message)
        if match is not None:
            whose = match.group(1) or b""
            # The lines of the further GPUs are indented; the root's, or a single GPU's, are not.
            if whose or not message.startswith(b" "):
                self.events.append(SpeedReported(_value(match.group(2)), whose.startswith(b"Overall")))

    def _done(self, line: bytes, message: bytes, thread: int) -> None:
        if message.startswith(b"Optimization stopped early"):
            self.events.append(StoppedEarly())
            return
        match = re.match(_DONE, message)
        if match is not None:
            days, hours, minutes, seconds = (int(group) if group else None for group in match.groups())
            parts = (days, hours, minutes, seconds)
            known = any(part is not None for part in parts)
            total = sum((part or 0) * unit for part, unit in zip(parts, (86400, 3600, 60, 1), strict=True))
            self.events.append(Finished(total if known else None))

    def _interrupted(self, line: bytes, message: bytes, thread: int) -> None:
        if message == b"Test interrupted.":
            self.events.append(StoppedEarly())
        elif (score := re.match(_SCORE, message)) is not None:
            number, value = score.groups()
            self.events.append(TestScore(int(number), _value(value), *self._test))
        elif message.startswith(b"Test net output"):
            self._mean_ap(line, message, thread)

    def _benchmark(self, line: bytes, message: bytes, thread: int) -> None:
        """Lines of ``caffe time``."""
        if message == b"*** Benchmark begins ***":
            self.events.append(Benchmarked("", 0.0))
        elif message == b"*** Benchmark ends ***":
            self.events.append(Finished(None))
        elif (match := re.match(_BENCHMARK, message)) is not None:
            self.events.append(Benchmarked(_text(match.group(1)), _value(match.group(2))))

    def _quantizing(self, line: bytes, message: bytes, thread: int) -> None:
        match = re.match(_QUANTIZING, message)
        if match is not None:
            what, done, total = match.groups()
            self.events.append(Quantizing(_text(what), int(done), int(total)))

    def _float(self, line: bytes, message: bytes, thread: int) -> None:
        match = re.match(_FLOAT, message)
        if match is not None:
            self.events.append(FloatOutput(_text(match.group(1)), _value(match.group(2))))

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
            self.events.append(TestLoss(_value(match.group(1)), self._batch_outputs))
            self.results[thread] = 0

    def _result(self, thread: int, message: bytes) -> bool:
        """Read a line of a thread that prints the results of ``caffe test``; False after the last."""
        match = re.match(_TEST_RESULT, message)
        if match is None:
            del self.results[thread]
            return False
        name, value, loss = match.groups()
        index = self.results[thread]
        self.results[thread] = index + 1
        self.events.append(TestOutput(_text(name), _value(value), None, 0, index, _optional(loss)))
        return True

    def _fatal(self, line: bytes, message: bytes, thread: int) -> None:
        """A process gave up: the present one, or another that gave up before it said anything."""
        complaint = self._complaint
        if _STARTS.search(line[:80]) and self._main >= 0 and (thread != self._main or self._began_training):
            self._start_process(line, thread)
        self._start_rank = _GAVE_UP
        text = _text(message)
        if complaint:
            text = f"{text} ({complaint})"
        self.events.append(Fatal(text))


_Handler = Callable[[MessageReader, bytes, bytes, int], None]
_HANDLERS: dict[bytes, _Handler] = {
    b"This": MessageReader._version,
    b"Usin": MessageReader._devices,
    b"Use ": MessageReader._devices,
    b"Init": MessageReader._initializing,
    b"outp": MessageReader._shape,
    b"Outp": MessageReader._shape,
    b"Top ": MessageReader._top_shape,
    b"TRAI": MessageReader._top_shape,
    b"TEST": MessageReader._top_shape,
    b"Sett": MessageReader._setting_up,
    b"A to": MessageReader._data_size,
    b"clas": MessageReader._class_ap,
    b"*** ": MessageReader._benchmark,
    b"Aver": MessageReader._benchmark,
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
    b"Quan": MessageReader._quantizing,
    b"Floa": MessageReader._float,
    b"Runn": MessageReader._planned,
    b"Batc": MessageReader._batch_line,
    b"Loss": MessageReader._loss,
}


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _numbers(raw: bytes) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(rb"\d+", raw))


def _value(raw: bytes) -> float:
    """A number that matched NUMBER."""
    try:
        return float(raw)
    except ValueError:  # as Windows prints it
        return float("-inf" if raw[:1] == b"-" else "inf") if b"#INF" in raw else float("nan")


def _positive(raw: bytes | None) -> float | None:
    """A speed. Stock Caffe prints nonsense (-5e+31 iter/s) before it has measured one."""
    try:
        value = float(raw) if raw is not None else 0.0
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def _optional(raw: bytes | None) -> float | None:
    return None if raw is None else _value(raw)
