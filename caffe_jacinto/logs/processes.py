"""A log file -> the stages in it, each folded from the lines of its own processes.

A file may hold one Caffe process after the other: stages, a resume, a test after a training, a start that
failed. Processes belong to one stage where the solver's ``snapshot_prefix`` says so. It may also hold several
at a time: of several containers or MPI ranks, told apart by what stands before each line, or processes that
are told apart by their thread numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.logs import events
from caffe_jacinto.logs.lines import LOG_HEADER, LineSplitter
from caffe_jacinto.logs.reader import LogReader
from caffe_jacinto.logs.skim import thinned
from caffe_jacinto.logs.stage import CHUNK, StageLog

_MOST_WAITING = 20_000
"""Events of a process that says nothing which stage it belongs to."""
_MOST_STAGES = 10_000


@dataclass(frozen=True)
class LogStage:
    """A stage in a log file."""

    log: StageLog
    label: str
    """The container, MPI rank or thread that its lines are of, where the file holds several; else empty."""


def read_log(
    path: Path, *, history: bool = False, every_point: bool = False, one_stage: bool = False
) -> list[LogStage]:
    """Read the log file at ``path`` piece by piece; memory does not grow with its length.

    ``history`` and ``every_point``: as for `StageLog`; with the latter, memory does grow. ``one_stage``: all
    of its processes are of one stage.

    Raises:
        UserError: it cannot be read, is empty, has no line of Caffe's in it, or holds processes that wrote at
            the same time and cannot be told apart.
    """

    def new_stage() -> StageLog:
        return StageLog(history=history, every_point=every_point)

    skim = not (history or every_point)
    try:
        splitter = LineSplitter(thin=thinned if skim else None)
        found = _read(path, splitter, lambda: _Stages(new_stage, skim, one_stage))
        processes = (
            None if one_stage or not any(stages.processes > 1 for stages in found.values()) else _apart(path)
        )
        if processes:
            found = _read(path, LineSplitter(processes), lambda: _Stages(new_stage, skim, one_stage))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not any(stages.is_caffe for stages in found.values()):
        raise UserError(f"{path}: {_why_no_log(path)}")
    several = sum(stages.is_caffe for stages in found.values()) > 1
    return [
        LogStage(log, label if several else "")
        for label, stages in sorted(found.items(), key=lambda item: (len(item[0]), item[0]))
        if stages.is_caffe
        for log in stages.all()
    ]


def _why_no_log(path: Path) -> str:
    """What a file is that no Caffe has written."""
    with path.open("rb") as file:
        ours = file.read(len(LOG_HEADER)) == LOG_HEADER.encode()
    if ours:
        return "the stage has logged nothing yet, or it was stopped while it started"
    return "is not a Caffe log: no line in it has the form of those that Caffe prints"


def _read(path: Path, splitter: LineSplitter, start: Callable[[], _Stages]) -> dict[str, _Stages]:
    """The stages of each container, rank or process."""
    found: dict[str, _Stages] = {}
    empty = True
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            empty = False
            for label, lines in splitter.feed(data).items():
                stages = found.get(label) or found.setdefault(label, start())
                stages.read(lines)
    for label, lines in splitter.close().items():
        stages = found.get(label) or found.setdefault(label, start())
        stages.read_last(lines)
    if empty:
        raise UserError(f"{path}: is empty; Caffe has not written to it yet")
    for stages in found.values():
        stages.close()
    return found


@dataclass
class _Stages:
    """Sorts the processes that ran one after the other into stages."""

    new_stage: Callable[[], StageLog]
    skim: bool
    one_stage: bool
    processes: int = 0
    _reader: LogReader = field(init=False)
    _stages: list[StageLog] = field(default_factory=list)
    _current: StageLog | None = None
    _waiting: list[events.Event] = field(default_factory=list)
    """The events of a process that has not said yet what it does."""

    def __post_init__(self) -> None:
        self._reader = LogReader(skim=self.skim)

    @property
    def is_caffe(self) -> bool:
        return self._reader.is_caffe

    def read(self, lines: list[bytes]) -> None:
        self._fold(self._reader.read(lines))

    def read_last(self, lines: list[bytes]) -> None:
        self._fold(self._reader.read_last(lines))

    def close(self) -> None:
        if self._waiting:
            self._place()
        if self._current is None and self.is_caffe:
            self._begin(None)
        if self._current is not None:
            self._current.last_stamp = self._reader.last_stamp
        for stage in self._stages:
            stage.end()

    def all(self) -> list[StageLog]:
        """The stages in the order in which they began."""
        return self._stages

    def _fold(self, found: list[events.Event]) -> None:
        for event in found:
            if type(event) is events.ProcessStarted:
                self._process_started(event)
            elif self._waiting:
                self._waiting.append(event)
                if self._is_decisive(event) or len(self._waiting) > _MOST_WAITING:
                    self._place()
            else:
                (self._current or self._begin(None)).take(event)
        if self._current is not None and not self._waiting:
            self._current.last_stamp = self._reader.last_stamp

    def _process_started(self, event: events.ProcessStarted) -> None:
        self.processes += 1
        if self._waiting:
            self._place()
        if self._current is not None:
            self._current.last_stamp = event.previous
        self._waiting.append(event)
        if self.one_stage:
            self._place()

    def _is_decisive(self, event: events.Event) -> bool:
        """Whether a waiting process has said what it does."""
        if isinstance(event, events.SolverStarted):
            return all(stage.prefix != event.snapshot_prefix for stage in self._stages)
        return isinstance(event, _DECISIVE)

    def _place(self) -> None:
        """Give the waiting events to their stage."""
        waiting, self._waiting = self._waiting, []
        start = waiting[0]
        assert isinstance(start, events.ProcessStarted)
        stage = self._stage_of(waiting)
        if stage is None:
            stage = self._begin(start)
            start = start._replace(previous=None)
        elif stage.last_stamp is not None:
            start = start._replace(previous=stage.last_stamp)
        self._current = stage
        for event in [start, *waiting[1:]]:
            stage.take(event)

    def _stage_of(self, waiting: list[events.Event]) -> StageLog | None:
        """The stage that a process goes on with, by its first events; None for a new one."""
        if not self._stages:
            return None
        if self.one_stage:
            return self._stages[-1]
        if any(isinstance(event, (events.TestPlanned, events.Benchmarked)) for event in waiting):
            return None
        solver = next((event for event in waiting if isinstance(event, events.SolverStarted)), None)
        if solver is None:
            # pycaffe tests the solver's network once more, after the training.
            return self._stages[-1] if isinstance(waiting[-1], events.TestStarted) else None
        prefix = solver.snapshot_prefix
        stage = next((found for found in reversed(self._stages) if found.prefix == prefix), None)
        if stage is None:
            # The end of a training whose beginning is in an earlier file.
            stage = next((found for found in reversed(self._stages) if found.wrote_under(prefix)), None)
        return None if stage is not None and stage.finished and not _resumes(waiting) else stage

    def _begin(self, start: events.ProcessStarted | None) -> StageLog:
        if len(self._stages) >= _MOST_STAGES:
            return self._stages[-1]
        self._current = stage = self.new_stage()
        stage.first_stamp = start.stamp if start is not None else self._reader.first_stamp
        stage.header_year = self._reader.header_year
        self._stages.append(stage)
        return stage


def _resumes(start: list[events.Event]) -> bool:
    """Whether a process with these first events goes on with a training."""
    return any(
        (isinstance(event, events.Restored) and event.is_state)
        or (isinstance(event, (events.TrainProgress, events.TestStarted)) and event.iteration > 0)
        for event in start
    )


_DECISIVE = (
    events.Restored,
    events.TrainProgress,
    events.TestStarted,
    events.TestPlanned,
    events.Benchmarked,
)


# Several processes at the same time

_SOLVER_LINE = re.compile(
    rb"^[IWEF]\d{4,8} [\d:.]{15} +(\d{1,18}) \w*\.\w+:\d+\] {1,9}(?:\[(?:\d{1,4}\.(\d{1,4})|[\w.]{1,20})\] )?"
    rb"(?:(Using GPUs [\d, ]{1,200}|Use GPU with|Use CPU|Initializing solver from)"
    rb"|Iteration (\d{1,18})[ ,][^\n]*loss = |Iteration \d+, Testing net| {4}Test net output|Snapshotting )",
    re.MULTILINE,
)
"""A line of a process that starts (third group), or of its solver: NVCaffe's with the device, one of training
with its iteration."""


def _apart(path: Path) -> dict[int, str]:
    """To which process each thread belongs, if processes wrote to the file at the same time; else nothing.

    Raises:
        UserError: they did, and the thread numbers do not tell them apart.
        OSError: the file cannot be read.
    """
    scan = _Scan()
    with path.open("rb") as file:
        splitter = LineSplitter()
        while data := file.read(CHUNK):
            for lines in splitter.feed(data).values():
                scan.read(b"\n".join(lines))
    if scan.repeats > 1 and not scan.returns:
        raise UserError(
            f"{path}: two Caffe processes wrote to it at the same time, line by line, under the same thread "
            "number, so their lines cannot be told apart; give each process a log of its own"
        )
    return scan.processes() if scan.returns else {}


class _Scan:
    """Which solvers speak, in turn. On several GPUs a solver has a thread for each."""

    def __init__(self) -> None:
        self.repeats = 0
        """How often a thread displayed an iteration again, and no process had started since."""
        self.returns = 0
        """How often a solver spoke again after another one, and no process had started between."""
        self._threads: list[int] = []
        """Threads of solvers, in the order of their first lines."""
        self._starts: list[int] = []
        """Threads that processes began with."""
        self._gpus: list[dict[int, int | None]] = []
        """Of each start that names GPUs: their threads, where they have spoken."""
        self._placed: set[int] = set()
        """Those threads."""
        self._first_of: dict[int, int] = {}
        """The thread that stands for the solver of a thread."""
        self._last = -1
        self._iterations: dict[int, int] = {}
        self._spoke: set[int] = set()
        """Solvers that have spoken since the last start."""

    def read(self, content: bytes) -> None:
        for thread, device, start, iteration in _SOLVER_LINE.findall(content):
            if start:
                self._start(int(thread), start)
            else:
                self._speak(
                    int(thread), int(device) if device else None, int(iteration) if iteration else None
                )

    def _start(self, thread: int, line: bytes) -> None:
        if thread not in self._starts:
            self._starts.append(thread)
        if line.startswith(b"Using GPUs "):
            self._gpus.append(dict.fromkeys(map(int, re.findall(rb"\d+", line))))
        self._iterations.clear()
        self._spoke.clear()

    def _speak(self, thread: int, device: int | None, iteration: int | None) -> None:
        if thread not in self._first_of:
            self._threads.append(thread)
            self._first_of[thread] = thread
        if device is not None:
            self._note_device(thread, device)
        if iteration is not None:
            self.repeats += iteration <= self._iterations.get(thread, -1)
            self._iterations[thread] = iteration
        solver = self._first_of[thread]
        self.returns += solver != self._last and solver in self._spoke
        self._spoke.add(solver)
        self._last = solver

    def _note_device(self, thread: int, device: int) -> None:
        """The thread is that of the latest solver with this device, unless that has another one for it."""
        if thread in self._placed:
            return
        threads = next((one for one in reversed(self._gpus) if one.get(device, 0) is None), None)
        if threads is not None:
            first = next((other for other in threads.values() if other is not None), thread)
            threads[device] = thread
            self._placed.add(thread)
            self._first_of[thread] = first

    def processes(self) -> dict[int, str]:
        found = {thread: f"thread {self._first_of[thread]}" for thread in self._threads}
        # NVCaffe's solver has threads of its own. Processes start in the order of their solvers.
        others = [thread for thread in self._starts if thread not in found]
        alone = [
            thread
            for thread in self._threads
            if thread not in self._starts and self._first_of[thread] == thread
        ]
        return found | {start: found[solver] for start, solver in zip(others, alone, strict=False)}
