"""One stage's log -> its figures. What the log does not say is None."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.logs import events
from caffe_jacinto.logs.curves import StageCurves
from caffe_jacinto.logs.glog import elapsed
from caffe_jacinto.logs.printed_net import PrintedNets, conv_sparsity
from caffe_jacinto.logs.reader import LogReader


@dataclass
class NetTests:
    """The outputs of one test net: the test being printed and the whole one before it."""

    current: dict[int, events.TestOutput] = field(default_factory=dict)
    ended: bool = False
    """Whether a later line of the solver shows that all outputs of ``current`` are there."""
    whole: dict[int, events.TestOutput] = field(default_factory=dict)
    expected: int | None = None

    def start(self, expected: int | None) -> None:
        if self.current:
            self.whole = self.last(None)
        self.current, self.ended, self.expected = {}, False, expected

    def last(self, net_outputs: int | None) -> dict[int, events.TestOutput]:
        """The last test whose outputs are all there."""
        # A blob can print several numbers, so that a test before tells more surely than the network.
        needed = self.expected or len(self.whole) or net_outputs or 1
        return self.current if self.current and (self.ended or len(self.current) >= needed) else self.whole


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
    """Seconds between those."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.seconds + other.seconds,
            self.iterations + other.iterations,
            self.training + other.training,
        )


class Timing:
    """The time of a log's processes; the gaps between them do not count."""

    def __init__(self) -> None:
        self._process = _Process()
        self._before = Spent()

    def start_process(self, event: events.ProcessStarted, first_stamp: str | None, year: int | None) -> None:
        """The process before, if any, has ended; ``first_stamp`` is the log's, ``year`` its first."""
        self._before = self.spent(first_stamp, event.previous, year)
        self._process = _Process(first_stamp=event.stamp)

    def progress(self, event: events.TrainProgress) -> None:
        if self._process.first_progress is None:
            self._process.first_progress = event
        self._process.last_progress = event

    def logged(self, seconds: int) -> None:
        """What the process itself says that it took."""
        self._process.logged_seconds = seconds

    def spent(self, first_stamp: str | None, last_stamp: str | None, year: int | None) -> Spent:
        """Of all processes, up to ``last_stamp``; ``first_stamp`` begins one whose own start is not told."""
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


_CHUNK = 1 << 20
_SNAPSHOT_ITERATION = re.compile(r"_iter_(\d+)\.(?:caffemodel|solverstate)(?:\.h5)?$")


@dataclass(frozen=True)
class StageFigures:
    """The figures of a stage, from its log alone."""

    caffe_version: str | None
    """As Caffe says it, e.g. ``NVCaffe 0.16.3``; stock Caffe 1.0 does not say."""
    finished: bool
    """The last training, or test, in the log came to its end."""
    iterations: int | None
    """Updates done; of a ``caffe test``, batches."""
    top1: float | None
    top5: float | None
    """Accuracies of the last whole test, by the ``top_k`` of the printed test network's Accuracy layers."""
    loss: float | None
    """The loss of the last whole test: the weighted sum of its losses."""
    outputs: dict[str, float]
    """Every output of the last whole test; those of a second test net with `` (#1)`` after the name."""
    sparsity: float | None
    """Zeros over weights of the convolutions, one directly before a softmax left out; three digits."""
    sparsity_logged: float | None
    """The total that the log states, whatever it counts."""
    gigamacs: float | None
    images_per_second: float | None
    """Training: iterations per second times the images behind one update."""
    images_per_second_logged: float | None
    """The closing figure of NVCaffe, which leaves out ``iter_size``."""
    seconds: float | None
    """Time the processes of the log took; the gaps between them do not count."""
    start_stamp: str | None
    year: int | None
    tested: bool
    """Whether this is ``caffe test`` and no training."""
    fatal: str | None
    """What Caffe gave up with, if the last process did."""
    solver_paths: tuple[str, ...]
    """Paths in the solver's settings that may tell the stage's name."""
    notes: tuple[str, ...]
    """Why a figure is missing, where that can be said."""


class StageLog:
    """Folds the events of one stage's log, in order, into its figures."""

    def __init__(self, *, curves: bool = False) -> None:
        self.curves = StageCurves() if curves else None
        self._reader = LogReader(skim=not curves)
        self._timing = Timing()
        self._version: events.Version | None = None
        self._gpus: tuple[int, ...] = ()
        self._solver: events.SolverStarted | None = None
        self._nets = PrintedNets()
        self._tests: dict[int, NetTests] = {}
        self._iteration: int | None = None
        self._sparsity: events.Sparsity | None = None
        self._unplotted_sparsity: float | None = None
        """Of a listing that waits for the line that names its iteration."""
        self._speed: float | None = None
        self._speed_is_overall = False
        self._planned: int | None = None
        self._finished = False
        self._stopped = False
        self._fatal: str | None = None
        self._trains = False
        """Whether the last process has begun to train."""
        self._trained = 0
        """How many processes have."""

    @property
    def is_caffe(self) -> bool:
        """Whether the log has a line of Caffe's."""
        return self._reader.is_caffe

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the log."""
        self._fold(self._reader.feed(data))

    def close(self) -> None:
        """The log ends here, for now."""
        self._fold(self._reader.close())
        self._plot_sparsity()
        tests = self._tests.get(0)
        if tests is not None and not tests.ended and self._last_test(0) is tests.current:
            self._plot_test(tests)

    def _fold(self, found: Iterable[events.Event]) -> None:
        for event in found:
            _FOLDERS[type(event)](self, event)

    # --- events -----------------------------------------------------------------------------------------

    def _progress(self, event: events.TrainProgress) -> None:
        self._timing.progress(event)
        self._iteration = event.iteration
        self._plot_sparsity()
        self._end_tests()
        if self.curves is not None and event.loss == event.loss:
            self.curves.loss.add(event.iteration, event.loss)

    def _learning_rate(self, event: events.LearningRate) -> None:
        if self.curves is not None:
            self.curves.learning_rate.add(event.iteration, event.lr)

    def _process_started(self, event: events.ProcessStarted) -> None:
        self._plot_sparsity()
        self._end_tests()
        self._timing.start_process(event, self._reader.first_stamp, self._year())
        self._nets.start_process()
        self._trains = False
        self._fatal = None

    def _year(self) -> int | None:
        return self._version.year if self._version else self._reader.header_year

    def _version_said(self, event: events.Version) -> None:
        self._version = event

    def _gpus_used(self, event: events.GpusUsed) -> None:
        self._gpus = event.ids

    def _solver_started(self, event: events.SolverStarted) -> None:
        self._solver = event

    def _net_printed(self, event: events.NetPrinted) -> None:
        self._nets.add(event)

    def _data_shape(self, event: events.DataShape) -> None:
        self._nets.add_shape(event)

    def _training_began(self, event: events.TrainingBegan) -> None:
        if not self._trains:
            self._trained += 1
        self._trains = True
        self._finished = self._stopped = False
        self._planned = None

    def _restored(self, event: events.Restored) -> None:
        match = _SNAPSHOT_ITERATION.search(event.path)
        if match and "solverstate" in event.path:
            self._iteration = int(match.group(1))

    def _test_started(self, event: events.TestStarted) -> None:
        self._end_tests()
        self._iteration = event.iteration
        self._plot_sparsity()
        self._tests.setdefault(event.net, NetTests()).start(None)

    def _test_output(self, event: events.TestOutput) -> None:
        tests = self._tests.setdefault(event.net, NetTests())
        tests.current[event.number] = event
        if self._planned is not None and event.iteration is None:
            self._finished = len(tests.current) >= (tests.expected or 1)

    def _end_tests(self) -> None:
        for tests in self._tests.values():
            if tests.current and not tests.ended:
                tests.ended = tests.expected is None
                self._plot_test(tests)

    def _plot_test(self, tests: NetTests) -> None:
        if self.curves is None:
            return
        accuracies = self._nets.accuracies(0)
        nvcaffe = self._version is not None and self._version.text.startswith("NVCaffe")
        for output in tests.current.values():
            # NVCaffe's test at iteration 0 is of one batch only.
            if output.net or output.iteration is None or (nvcaffe and output.iteration == 0):
                continue
            if output.name == accuracies.get(1):
                self.curves.top1.add(output.iteration, output.value)
            elif output.name == accuracies.get(5):
                self.curves.top5.add(output.iteration, output.value)

    def _test_planned(self, event: events.TestPlanned) -> None:
        self._planned = event.batches
        self._iteration = 0
        self._finished = False

    def _batch_tested(self, event: events.BatchTested) -> None:
        self._iteration = event.batch + 1

    def _test_loss(self, event: events.TestLoss) -> None:
        self._tests.setdefault(0, NetTests()).start(event.outputs or None)

    def _sparsity_listed(self, event: events.Sparsity) -> None:
        self._sparsity = event
        if self.curves is not None:
            self._unplotted_sparsity = self._conv_sparsity()

    def _plot_sparsity(self) -> None:
        """A listing comes just before the first line of its iteration; the last one has none after it."""
        if self.curves is None or self._unplotted_sparsity is None or self._iteration is None:
            return
        self.curves.sparsity.add(self._iteration, self._unplotted_sparsity)
        self._unplotted_sparsity = None

    def _snapshot_written(self, event: events.SnapshotWritten) -> None:
        self._end_tests()
        match = _SNAPSHOT_ITERATION.search(event.path)
        if match:
            self._iteration = int(match.group(1))

    def _speed_reported(self, event: events.SpeedReported) -> None:
        self._end_tests()
        self._speed, self._speed_is_overall = event.images_per_second, event.overall

    def _stopped_early(self, event: events.StoppedEarly) -> None:
        self._end_tests()
        self._stopped = True
        self._finished = False

    def _done(self, event: events.Finished) -> None:
        self._end_tests()
        self._finished = not self._stopped
        if event.seconds is not None:
            self._timing.logged(event.seconds)

    def _failed(self, event: events.Fatal) -> None:
        self._fatal = self._fatal or event.text
        if self._trains or self._planned is not None:
            self._finished = False

    # --- figures ----------------------------------------------------------------------------------------

    def figures(self) -> StageFigures:
        """The figures as of the last whole line."""
        outputs = self._last_test(0)
        accuracies = self._nets.accuracies(0)
        named = by_name(outputs)
        losses = [output.loss for output in outputs.values() if output.loss is not None]
        seconds = None if self._reader.last_stamp is None else round(self._spent().seconds, 3)
        return StageFigures(
            caffe_version=self._version.text if self._version else None,
            finished=self._finished,
            iterations=self._iterations(),
            top1=named.get(accuracies.get(1, "")),
            top5=named.get(accuracies.get(5, "")),
            loss=float(f"{sum(losses):.6g}") if losses else None,
            outputs=self._all_outputs(),
            sparsity=self._conv_sparsity(),
            sparsity_logged=self._sparsity.total if self._sparsity else None,
            gigamacs=self._gigamacs(),
            images_per_second=self._images_per_second(),
            images_per_second_logged=self._speed,
            seconds=seconds,
            start_stamp=self._reader.first_stamp,
            year=self._year(),
            tested=self._planned is not None and not self._trained,
            fatal=self._fatal,
            solver_paths=self._solver_paths(),
            notes=self._notes(),
        )

    def _spent(self) -> Spent:
        return self._timing.spent(self._reader.first_stamp, self._reader.last_stamp, self._year())

    def _iterations(self) -> int | None:
        if self._finished and self._planned is not None:
            return self._planned
        if self._finished and self._solver is not None and self._solver.max_iter is not None:
            return self._solver.max_iter
        return self._iteration

    def _last_test(self, number: int) -> dict[int, events.TestOutput]:
        tests = self._tests.get(number)
        net = self._nets.of("TEST", number)
        return tests.last(net.outputs() if net else None) if tests else {}

    def _all_outputs(self) -> dict[str, float]:
        found = {}
        for number in sorted(self._tests):
            ending = f" (#{number})" if number else ""
            for name, value in by_name(self._last_test(number)).items():
                found[name + ending] = value
        return found

    def _gigamacs(self) -> float | None:
        net = self._nets.main()
        total = net.gigamacs if net else None
        if total is None:
            return None
        return round(total, 4) if total >= 0.1 else float(f"{total:.4g}")

    def _images_per_second(self) -> float | None:
        """By the whole stage; from NVCaffe's closing figure, or from the first and last line of training."""
        if self._solver is None:
            return None
        passes = self._solver.iter_size
        if self._speed is not None and self._trained <= 1 and (self._speed_is_overall or len(self._gpus) < 2):
            return _speed_digits(self._speed * passes)
        net = self._nets.of("TRAIN")
        batch = net.batch if net else None
        spent = self._spent()
        if batch is None or spent.training <= 0:
            return None
        # Both kinds of Caffe print the batch of one GPU: NVCaffe has divided it before it prints.
        return _speed_digits(spent.iterations / spent.training * batch * max(1, len(self._gpus)) * passes)

    def _conv_sparsity(self) -> float | None:
        net = self._nets.main()
        return conv_sparsity(self._sparsity, net) if self._sparsity is not None and net is not None else None

    def _solver_paths(self) -> tuple[str, ...]:
        if self._solver is None:
            return ()
        names = ("snapshot_prefix", "train_net", "net")
        return tuple(path for name in names if (path := self._solver.settings.string(name)))

    def _notes(self) -> tuple[str, ...]:
        if self._nets.any_is_cut():
            return (
                "the log's printed network is cut off (glog's limit): what is counted from it is missing",
            )
        return ()


def _speed_digits(speed: float) -> float:
    return round(speed, 1) if speed >= 10 else float(f"{speed:.3g}")


_FOLDERS: dict[type, Any] = {
    events.TrainProgress: StageLog._progress,
    events.LearningRate: StageLog._learning_rate,
    events.ProcessStarted: StageLog._process_started,
    events.Version: StageLog._version_said,
    events.GpusUsed: StageLog._gpus_used,
    events.SolverStarted: StageLog._solver_started,
    events.NetPrinted: StageLog._net_printed,
    events.DataShape: StageLog._data_shape,
    events.TrainingBegan: StageLog._training_began,
    events.Restored: StageLog._restored,
    events.TestStarted: StageLog._test_started,
    events.TestOutput: StageLog._test_output,
    events.TestPlanned: StageLog._test_planned,
    events.BatchTested: StageLog._batch_tested,
    events.TestLoss: StageLog._test_loss,
    events.Sparsity: StageLog._sparsity_listed,
    events.SnapshotWritten: StageLog._snapshot_written,
    events.SpeedReported: StageLog._speed_reported,
    events.StoppedEarly: StageLog._stopped_early,
    events.Finished: StageLog._done,
    events.Fatal: StageLog._failed,
}


def read_stage(path: Path, *, curves: bool = False) -> StageLog:
    """Read the log file at ``path`` in pieces; memory does not grow with its length.

    Raises:
        UserError: it cannot be read, is empty, or has no line of Caffe's in it.
    """
    log = StageLog(curves=curves)
    empty = True
    try:
        with path.open("rb") as file:
            while data := file.read(_CHUNK):
                empty = False
                log.feed(data)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    log.close()
    if empty:
        raise UserError(f"{path}: is empty; Caffe has not printed anything to it")
    if not log.is_caffe:
        raise UserError(f"{path}: is no Caffe log: no line in it is of the form that Caffe prints")
    return log
