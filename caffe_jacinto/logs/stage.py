"""Collects the figures of one stage from its log, event by event.

The report, the live line and ``train --status`` are views of this one fold. A figure that the log does not
contain is None.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from caffe_jacinto.logs import events
from caffe_jacinto.logs.events import elapsed
from caffe_jacinto.logs.history import StageHistory
from caffe_jacinto.logs.loss import LossCheck
from caffe_jacinto.logs.notes import Facts, stage_notes
from caffe_jacinto.logs.printed_net import (
    DETECTIONS,
    PrintedNet,
    PrintedNets,
    conv_sparsity,
    named_accuracies,
)
from caffe_jacinto.logs.reader import LogReader
from caffe_jacinto.logs.solver_tests import NetTests, SolverTest, by_name
from caffe_jacinto.logs.timing import Spent, Timing
from caffe_jacinto.prototxt import tree

CHUNK = 1 << 20
"""Bytes of a log that are read at once."""
PACE_POINTS = 50
"""Displays that the pace is measured over."""

_MOST_TESTS = 10_000
"""Tests kept for the live view: more than any training has."""

_SNAPSHOT_ITERATION = re.compile(r"_iter_(\d{1,18})(?:\.(?:caffemodel|solverstate)(?:\.h5)?)?$")


@dataclass(frozen=True)
class StageFigures:
    """The figures of a stage, from its log alone."""

    caffe_version: str | None
    """As Caffe prints it, e.g. ``NVCaffe 0.16.3``; stock Caffe 1.0 does not print it."""
    finished: bool
    """The last training, or test, in the log ended normally."""
    iterations: int | None
    """Updates done; of a ``caffe test``, batches."""
    top1: float | None
    top5: float | None
    """Accuracies of the last complete test, by the ``top_k`` of the printed network's Accuracy layers; where
    the log does not hold that network, by the names of the outputs."""
    mean_ap: float | None
    """A detector's mean average precision in the last complete test."""
    loss: float | None
    """The loss of the last complete test: the weighted sum of its losses."""
    train_loss: float | None
    """The training loss displayed last, smoothed as Caffe does."""
    outputs: dict[str, float]
    """Every output of the last complete test; those of a second test net have `` (#1)`` after the name."""
    accuracies: dict[str, str]
    """The names in `outputs` of each test net's accuracies, by what they are: ``top-1``, ``top-5 (#1)``."""
    sparsity: float | None
    """Zeros over weights of the convolutions, one directly before a softmax left out; three digits."""
    sparsity_logged: float | None
    """The total that the log states, whatever it counts."""
    gigamacs: float | None
    gigamacs_left: float | None
    """Of `gigamacs`, when weights that are zero cost nothing, by the last listing of sparsity."""
    classes: int | None
    image_size: tuple[int, int] | None
    """Height and width of the network's images, after the crop."""
    images_per_second: float | None
    """Training: iterations per second times the images behind one update."""
    images_per_second_logged: float | None
    """The closing figure of NVCaffe, which leaves out ``iter_size``."""
    images_per_iteration: int | None
    """Training images behind one update."""
    iterations_per_epoch: float | None
    """Updates in which all training images are used once, where the log says how many there are."""
    seconds: float | None
    """Time the processes of the log took; the gaps between them do not count."""
    start_stamp: str | None
    year: int | None
    tested: bool
    """Whether this is ``caffe test`` and no training."""
    quantized: bool
    """Whether that was a test in quantized values."""
    weight_bits: int | None
    activation_bits: int | None
    """Of a test in quantized values."""
    float_top1: float | None
    """Top-1 of the network before it was quantized, on the same images."""
    timed: bool
    """Whether this is ``caffe time``."""
    began: bool
    """Whether it has begun to train, to test or to measure."""
    trained: bool
    """Whether it has trained: a solver with no iterations only tests."""
    fatal: str | None
    """The error that ended the last process, if any."""
    settings: tree.Message | None = field(compare=False)
    """The solver's, as the last process printed them."""
    solver_paths: tuple[str, ...]
    """Paths in the solver's settings that may contain the stage's name."""
    start_weights: str | None
    """The weights file that training began with, as the log names it."""
    start_top1: float | None
    """Top-1 of those weights, by the test at iteration 0; NVCaffe's is of one batch only, and left out."""
    notes: tuple[str, ...]
    """Why a figure is missing, and what is wrong with the last losses."""


class StageLog:
    """Folds the events of one stage's log, in order."""

    def __init__(
        self,
        *,
        live: bool = False,
        history: bool = False,
        every_point: bool = False,
        test_net: str | None = None,
    ) -> None:
        """``live`` collects the facts that the live line and retention need; ``history`` the curves, with
        ``every_point`` of them.

        Without any, lines of training are skimmed, which is several times as fast. ``test_net`` is the
        text of the stage's test network, used where glog has cut the printed one.
        """
        self.history = StageHistory(every_point) if history or every_point else None
        self.iteration: int | None = None
        """The iteration reached; in ``caffe test``, the batch."""
        self.loss: float | None = None
        """The loss of the last display."""
        self.losses = LossCheck()
        """What goes wrong with the losses displayed."""
        self.learning_rate: float | None = None
        """Not read when the log is skimmed."""
        self.displays = 0
        """How many lines with a training loss have been read."""
        self.in_test = False
        """Whether a test has begun, and no line of the solver has come after it."""
        self.batches: int | None = None
        """Batches that ``caffe test`` runs."""
        self.quantizing: events.Quantizing | None = None
        """How far a calibration, or what else comes before or after a test of ours, is."""
        self._float: dict[str, float] = {}
        """The outputs of the network before it was quantized."""
        self._start_weights: str | None = None
        self._start_outputs: dict[str, float] | None = None
        """Of the test of those weights before the first update."""
        self.fatal: str | None = None
        """The error that ended the last process, if any."""
        self.tests: dict[int, SolverTest] = {}
        """Live: the complete tests by iteration."""
        self.snapshots: set[int] = set()
        """Live: iterations whose snapshot was begun since `resume_at`."""
        self._live = live
        self._reader = LogReader(skim=not (live or self.history is not None))
        self.first_stamp: str | None = None
        self.last_stamp: str | None = None
        """glog's date and time of the first and the last line."""
        self.header_year: int | None = None
        self._timing = Timing()
        self._pace: deque[tuple[int, str]] = deque(maxlen=PACE_POINTS)
        self._version: events.Version | None = None
        self._gpus: tuple[int, ...] = ()
        self._solver: events.SolverStarted | None = None
        self._nets = PrintedNets(test_net)
        self._tests: dict[int, NetTests] = {}
        self._is_new = False
        """Whether the last process has not displayed an iteration yet."""
        self._has_listed = False
        """Whether it has listed the sparsity."""
        self._recalibrated = False
        """Whether the network's statistics are recalibrated ones, as at the end of a stage."""
        self._test_recalibrated = False
        """Whether those of the last test were."""
        self._snapshot = ""
        """The path of the last one."""
        self._epochs: tuple[int, float] | None = None
        """An iteration, and the epochs that were done then."""
        self._silent: events.TestStarted | None = None
        """The test that has begun and has not printed anything."""
        self._silent_tests: list[int] = []
        """Iterations of the first and the last test that printed nothing."""
        self._times: dict[str, float] = {}
        """Of ``caffe time``: milliseconds, by name."""
        self._sparsity: events.Sparsity | None = None
        self._speed: float | None = None
        self._speed_is_overall = False
        self._finished = False
        self._stopped = False
        self._trains = False
        """Whether the last process has begun to train."""
        self._trained = 0
        """How many processes have begun to train."""

    @property
    def is_caffe(self) -> bool:
        """Whether the log has a line of Caffe's."""
        return self._reader.is_caffe

    @property
    def prefix(self) -> str | None:
        """The ``snapshot_prefix`` of the last solver; None before one is printed."""
        return self._solver.snapshot_prefix if self._solver else None

    def wrote_under(self, prefix: str) -> bool:
        """Whether its solver is not known, and its snapshots begin with ``prefix``."""
        return self._solver is None and bool(prefix) and self._snapshot.startswith(f"{prefix}_iter_")

    @property
    def finished(self) -> bool:
        """Whether the last training or test ended normally."""
        return self._finished

    def feed(self, data: bytes) -> list[events.Event]:
        """Take the next bytes of the log; returns the events that they completed."""
        return self._fold(self._reader.feed(data))

    def close(self) -> list[events.Event]:
        """The log ends here, for now."""
        found = self._fold(self._reader.close())
        self.end()
        return found

    def end(self) -> None:
        """There are no more events, for now."""
        if self.history is not None:
            self.history.close(self.iteration)
        tests = self._tests.get(0)
        if tests is not None and not tests.ended and self._last_test(0) is tests.current:
            self._take_test(tests)

    def _fold(self, found: list[events.Event]) -> list[events.Event]:
        reader = self._reader
        self.first_stamp, self.last_stamp = reader.first_stamp, reader.last_stamp
        self.header_year = reader.header_year
        for event in found:
            self.take(event)
        return found

    def take(self, event: events.Event) -> None:
        """Take the next event. Its caller keeps `first_stamp`, `last_stamp` and `header_year`."""
        if type(event) is events.TestScore:
            event = self._named(event)
        self._take(event)
        if self.history is not None:
            listed = self.sparsity if isinstance(event, events.Sparsity) else None
            self.history.take(event, listed, self._is_nvcaffe())

    def _named(self, score: events.TestScore) -> events.TestOutput:
        """The output of a test that the log of 2014 gives by its number."""
        net = self._nets.of("TEST", score.net)
        names = (net.outputs if net else None) or []
        known = score.number < len(names)
        name = names[score.number] if known else f"score {score.number}"
        weight = net.loss_weight(name) if net and known else None
        loss = None if weight is None else weight * score.value
        return events.TestOutput(name, score.value, score.iteration, score.net, score.number, loss)

    def _is_nvcaffe(self) -> bool:
        return self._version is not None and self._version.text.startswith("NVCaffe")

    def resume_at(self, iteration: int) -> None:
        """A new process resumes at ``iteration``: what earlier ones did beyond it does not count."""
        self.iteration = iteration
        self.tests = {tested: test for tested, test in self.tests.items() if tested <= iteration}
        self.snapshots.clear()
        self._new_process()

    def _new_process(self) -> None:
        self.fatal = self.quantizing = None
        self._float.clear()
        self._silent = None
        self.in_test = False
        self._recalibrated = False
        self._pace.clear()
        self.losses.restart()

    # --- events -----------------------------------------------------------------------------------------

    def _take(self, event: events.Event) -> None:
        match event:  # the most frequent first
            case events.TrainProgress():
                self._progress(event)
            case events.LearningRate():
                self.learning_rate = event.lr
            case events.TestOutput():
                self._test_output(event)
            case events.TestStarted():
                self._test_started(event)
            case events.Evaluated():
                self._evaluated(event)
            case events.BatchTested():
                self.iteration = event.batch + 1
                self.quantizing = None
            case events.Sparsity():
                self._sparsity, self._has_listed = event, True
            case events.SnapshotWritten():
                self._snapshot_written(event)
            case events.Recalibrated():
                self._statistics_recalibrated(event)
            case events.ProcessStarted():
                self._process_started(event)
            case events.Version():
                self._version = event
            case events.GpusUsed():
                self._gpus = event.ids
            case events.SolverStarted():
                self._solver = event
            case events.NetPrinted():
                self._nets.add(event)
            case events.DataShape() | events.TopShape() | events.DataSize():
                self._nets.add_shape(event)
            case events.Benchmarked():
                self._times[event.name] = event.milliseconds
            case events.Restored():
                self._restored(event)
            case events.TrainingBegan():
                self._training_began()
            case events.Quantizing():
                self.quantizing = event
            case events.FloatOutput():
                self._float[event.name] = event.value
            case events.TestPlanned():
                self.batches, self.iteration, self._finished = event.batches, 0, False
            case events.TestLoss():
                self._tests.setdefault(0, NetTests()).start(event.outputs or None)
            case events.SpeedReported():
                self._end_tests()
                self._speed, self._speed_is_overall = event.images_per_second, event.overall
            case events.StoppedEarly():
                self._end_tests()
                self._stopped, self._finished = True, False
            case events.Finished():
                self._done(event)
            case events.Fatal():
                self._failed(event)

    def _begin_at(self, iteration: int) -> None:
        """The last process is at this iteration; if it trains from the start, nothing earlier counts."""
        if self._is_new and iteration == 0:
            self._tests.clear()
            self._sparsity = self._sparsity if self._has_listed else None
        self._is_new = False

    def _progress(self, event: events.TrainProgress) -> None:
        self._begin_at(event.iteration)
        if not self._trains:  # pycaffe does not announce it
            self._training_began()
        self._note_silent()
        self._timing.progress(event)
        self._pace.append((event.iteration, event.stamp))
        self.iteration, self.loss = event.iteration, event.loss
        self.losses.take(event.iteration, event.loss, self._nets.softmax_losses())
        self.displays += 1
        if event.epochs:
            self._epochs = (event.iteration, event.epochs)
        self._recalibrated = False
        self._end_tests()

    def _process_started(self, event: events.ProcessStarted) -> None:
        self._end_tests()
        self._is_new, self._has_listed = True, False
        self._timing.start_process(event, self.first_stamp, self._year())
        self._nets.start_process()
        self._trains = False
        self._new_process()

    def _year(self) -> int | None:
        year = self._version.year if self._version else None
        return year or self.header_year

    def _training_began(self) -> None:
        if not self._trains:
            self._trained += 1
        self._trains = True
        self._finished = self._stopped = False
        self.batches = None

    def _restored(self, event: events.Restored) -> None:
        match = _SNAPSHOT_ITERATION.search(event.path)
        if match and event.is_state:
            self.iteration = int(match.group(1))
        if not event.is_state and self._start_weights is None:
            self._start_weights = event.path

    def _note_silent(self) -> None:
        """The solver has gone on: a test that has not printed anything will not."""
        if self._silent is not None:
            self._silent_tests = [*self._silent_tests[:1], self._silent.iteration]
            self._silent = None

    def _test_started(self, event: events.TestStarted) -> None:
        self._note_silent()
        self._silent = event
        self._end_tests()
        self._begin_at(event.iteration)
        self.iteration = event.iteration
        self.in_test = True
        self._test_recalibrated = self._recalibrated
        self._tests.setdefault(event.net, NetTests()).start(None)

    def _statistics_recalibrated(self, event: events.Recalibrated) -> None:
        if event.this_test:
            self._test_recalibrated = True
        else:
            self._end_tests()
            self._recalibrated = True

    def _test_output(self, event: events.TestOutput) -> None:
        tests = self._tests.setdefault(event.net, NetTests())
        tests.current[event.number] = event
        self._silent = None
        if self.batches is not None and event.iteration is None:
            self._finished = len(tests.current) >= (tests.expected or 1)

    def _evaluated(self, event: events.Evaluated) -> None:
        """py-faster-rcnn has tested the trained network, or, where the log has no training, a given one."""
        self._end_tests()
        tests = self._tests.setdefault(0, NetTests())
        tests.start(None)
        values = [("Mean AP", event.mean_ap), *((f"AP for {name}", ap) for name, ap in event.class_ap)]
        for number, (name, value) in enumerate(values):
            tests.current[number] = events.TestOutput(name, value, None, 0, number, None, mean_ap=not number)
        tests.ended = True
        if not self._trained:
            self.batches = self.iteration = event.images
            self._finished = True

    def _end_tests(self) -> None:
        """Training has continued, so the earlier tests have all their outputs."""
        self.in_test = False
        if self._start_outputs is None and self._start_weights is not None:
            self._take_start()
        for tests in self._tests.values():
            if tests.current and not tests.ended:
                tests.ended = tests.expected is None
                self._take_test(tests)

    def _take_start(self) -> None:
        tests = self._tests.get(0)
        if tests is not None and tests.current and next(iter(tests.current.values())).iteration == 0:
            self._start_outputs = by_name(tests.current)

    def _take_test(self, tests: NetTests) -> None:
        """Keep a complete test for the live view."""
        first = next(iter(tests.current.values()))
        if self._live and first.iteration is not None:
            self._keep_test(first.iteration, first.net, by_name(tests.current))

    def _keep_test(self, iteration: int, net: int, outputs: dict[str, float]) -> None:
        """Keep the outputs of test net number ``net``, together with those of the nets before it."""
        if net:
            before = self.tests.get(iteration)
            if before is not None:
                before.outputs.update({f"{name} (#{net})": value for name, value in outputs.items()})
            return
        top1 = outputs.get(self._accuracies(outputs).get(1, ""))
        self.tests[iteration] = SolverTest(outputs, top1, self._test_recalibrated)
        if len(self.tests) > _MOST_TESTS:
            del self.tests[next(iter(self.tests))]

    def _snapshot_written(self, event: events.SnapshotWritten) -> None:
        self._end_tests()
        match = _SNAPSHOT_ITERATION.search(event.path)
        self._snapshot = event.path
        if match:
            self.iteration = int(match.group(1))
            if self._live:
                self.snapshots.add(self.iteration)

    def _done(self, event: events.Finished) -> None:
        if not self._stopped:
            self._note_silent()
        self._end_tests()
        self._finished = not self._stopped
        if event.seconds is not None:
            self._timing.logged(event.seconds)

    def _failed(self, event: events.Fatal) -> None:
        self.in_test = False
        self.fatal = self.fatal or event.text
        if self._trains or self.batches is not None:
            self._finished = False

    # --- the live view ----------------------------------------------------------------------------------

    @property
    def max_iter(self) -> int | None:
        return self._solver.max_iter if self._solver else None

    @property
    def net(self) -> PrintedNet | None:
        """The network whose cost counts; see `PrintedNets.main`."""
        return self._nets.main()

    @property
    def sparsity(self) -> float | None:
        """Zeros over weights of the convolutions that count, by the last listing and the printed network."""
        net = self._nets.main()
        return conv_sparsity(self._sparsity, net) if self._sparsity is not None and net is not None else None

    @property
    def sparsity_logged(self) -> float | None:
        """The total of the last listing, whatever it counts."""
        return self._sparsity.total if self._sparsity else None

    def accuracy_names(self) -> dict[str, str]:
        """``top-1``, ``top-5`` by the test net's output that holds it."""
        found = self._accuracies(by_name(self._last_test(0)))
        return {output: f"top-{top_k}" for top_k, output in sorted(found.items())}

    def results(self) -> dict[str, float]:
        """The outputs of ``caffe test``, once it has printed them."""
        return by_name(self._last_test(0)) if self.batches is not None and self._finished else {}

    def seconds_per_iteration(self) -> float | None:
        """Over the last displays, with the tests and snapshots between them."""
        if len(self._pace) < 2:
            return None
        (first, first_stamp), (last, last_stamp) = self._pace[0], self._pace[-1]
        seconds = elapsed(first_stamp, last_stamp)
        return seconds / (last - first) if last > first and seconds > 0 else None

    # --- figures ----------------------------------------------------------------------------------------

    def figures(self) -> StageFigures:
        """The figures as of the last complete line."""
        outputs = {} if self._is_tested_at_start_only() else self._last_test(0)
        main = self._nets.main()
        named = by_name(outputs)
        accuracies = self._accuracies(named)
        bits = main.bits if main else None
        losses = [output.loss for output in outputs.values() if output.loss is not None]
        seconds = None if self.last_stamp is None else round(self._spent().seconds, 3)
        return StageFigures(
            caffe_version=self._version.text if self._version else None,
            finished=self._finished,
            iterations=self._iterations(),
            top1=named.get(accuracies.get(1, "")),
            top5=named.get(accuracies.get(5, "")),
            mean_ap=named.get(self._mean_ap(outputs.values()) or ""),
            loss=float(f"{sum(losses):.6g}") if losses else None,
            train_loss=self.loss,
            outputs={} if self._is_tested_at_start_only() else self._all_outputs(),
            accuracies=self._all_accuracies(),
            sparsity=self.sparsity,
            sparsity_logged=self.sparsity_logged,
            gigamacs=_cost_digits(main.gigamacs if main else None),
            gigamacs_left=_cost_digits(self._gigamacs_left()),
            classes=main.classes if main else None,
            image_size=main.image_size if main else None,
            images_per_second=self._images_per_second(),
            images_per_second_logged=self._speed,
            images_per_iteration=self._images_per_iteration(),
            iterations_per_epoch=self._iterations_per_epoch(),
            seconds=seconds,
            start_stamp=self.first_stamp,
            year=self._year(),
            tested=self.batches is not None and not self._trained,
            quantized=bits is not None,
            weight_bits=bits[0] if bits else None,
            activation_bits=bits[1] if bits else None,
            float_top1=self._float.get(accuracies.get(1, "")),
            timed=bool(self._times) and not self._trained,
            began=self._began,
            trained=self._has_trained,
            fatal=self.fatal,
            settings=self._solver.settings if self._solver else None,
            solver_paths=self._solver_paths(),
            start_weights=self._start_weights,
            start_top1=None if self._is_nvcaffe() else (self._start_outputs or {}).get(accuracies.get(1, "")),
            notes=stage_notes(self._facts(named)),
        )

    def _spent(self) -> Spent:
        return self._timing.spent(self.first_stamp, self.last_stamp, self._year())

    def _iterations(self) -> int | None:
        stated = self.max_iter if self.batches is None else self.batches
        return stated if self._finished and stated is not None else self.iteration

    def _last_test(self, number: int) -> dict[int, events.TestOutput]:
        tests = self._tests.get(number)
        net = self._nets.of("TEST", number)
        return tests.last(len(net.outputs) if net and net.outputs is not None else None) if tests else {}

    def _is_tested_at_start_only(self) -> bool:
        """Whether it has ended, and its last test came before its first update."""
        last = next(iter(self._last_test(0).values()), None)
        ended = self._finished and self._has_trained and (self._iterations() or 0) > 0
        return ended and last is not None and last.iteration == 0

    def _accuracies(self, outputs: Iterable[str], number: int = 0) -> dict[int, str]:
        """top_k -> the output of a test net that holds it; by its name where the net is not known."""
        net = self._nets.of("TEST", number)
        if net is not None and net.message is not None:
            return net.accuracies
        return named_accuracies(outputs)

    def _mean_ap(self, outputs: Iterable[events.TestOutput], number: int = 0) -> str | None:
        """The output of a test net that is a detector's mean average precision.

        By the line that NVCaffe prints it in, or SSD's layer; by its name where the net is not known.
        """
        stated = next((output.name for output in outputs if output.mean_ap), None)
        net = self._nets.of("TEST", number)
        known = net is not None and net.message is not None
        name = net.mean_ap if net is not None and known else DETECTIONS
        return stated or next((output.name for output in outputs if output.name == name), None)

    def _all_accuracies(self) -> dict[str, str]:
        found = {}
        for number in sorted(self._tests):
            ending = f" (#{number})" if number else ""
            outputs = self._last_test(number)
            for top_k, name in sorted(self._accuracies(by_name(outputs), number).items()):
                found[f"top-{top_k}{ending}"] = name + ending
            mean_ap = self._mean_ap(outputs.values(), number)
            if mean_ap is not None:
                found[f"mAP{ending}"] = mean_ap + ending
        return found

    def _all_outputs(self) -> dict[str, float]:
        found = {}
        for number in sorted(self._tests):
            ending = f" (#{number})" if number else ""
            for name, value in by_name(self._last_test(number)).items():
                found[name + ending] = value
        return found

    def _gigamacs_left(self) -> float | None:
        """Each weight of a layer has the same share of its cost. None where the sparsity is not known."""
        net, listed = self._nets.main(), self._sparsity
        if net is None or net.gigamacs is None or listed is None or self.sparsity is None:
            return None
        saved = sum((cost.macs or 0) * listed.blobs.get((cost.name, 0), 0.0) for cost in net.costs)
        return net.gigamacs - saved / 1e9

    def _images_per_second(self) -> float | None:
        """For the whole stage: from NVCaffe's final figure, or from the first and last line of training."""
        if self._solver is None:
            return None
        if self._speed is not None and self._trained <= 1 and (self._speed_is_overall or len(self._gpus) < 2):
            return _speed_digits(self._speed * self._solver.iter_size)
        images = self._images_per_iteration()
        spent = self._spent()
        if images is None or spent.training <= 0:
            return None
        return _speed_digits(spent.iterations / spent.training * images)

    def _images_per_iteration(self) -> int | None:
        net = self._nets.of("TRAIN")
        if self._solver is None or net is None or net.batch is None:
            return None
        # Both kinds of Caffe print the batch of one GPU: NVCaffe has divided it before it prints.
        return net.batch * max(1, len(self._gpus)) * self._solver.iter_size

    def _iterations_per_epoch(self) -> float | None:
        if self._epochs is not None:
            iteration, epochs = self._epochs
            return iteration / epochs
        net, images = self._nets.of("TRAIN"), self._images_per_iteration()
        return net.images / images if net is not None and net.images and images else None

    def _solver_paths(self) -> tuple[str, ...]:
        if self._solver is None:
            return ()
        names = ("snapshot_prefix", "train_net", "net")
        return tuple(path for name in names if (path := self._solver.settings.string(name)))

    @property
    def _has_trained(self) -> bool:
        return self._trained > 0 and (self.displays > 1 or bool(self.iteration))

    @property
    def _began(self) -> bool:
        return self.batches is not None or bool(self._trained or self._times or self._tests)

    def _facts(self, outputs: dict[str, float]) -> Facts:
        """What `stage_notes` judges; ``outputs`` are those of the last complete test."""
        main, test_net = self._nets.main(), self._nets.of("TEST")
        train = self._nets.of("TRAIN")
        last = self._last_test(0).values()
        mean_ap = self._mean_ap(last)
        return Facts(
            began=self._began,
            trained=self._has_trained,
            fatal=self.fatal,
            times=self._times,
            displays=self.displays,
            outputs=outputs,
            tested_at_start_only=self._is_tested_at_start_only(),
            accuracies=self._accuracies(outputs),
            is_detector=mean_ap is not None,
            named_mean_ap=None if any(output.mean_ap for output in last) else mean_ap,
            test_net_is_known=test_net is not None and test_net.message is not None,
            cut=self._nets.any_is_cut(),
            printed=self._nets.any_is_printed,
            gigamacs=main.gigamacs if main else None,
            net=main,
            solver_is_printed=self._solver is not None,
            images_per_second=self._images_per_second(),
            batch=train.batch if train else None,
            sparsity=self.sparsity,
            sparsity_logged=self.sparsity_logged,
            counts_inner_products=self._sparsity is not None and self._sparsity.inner_products,
            silent_tests=self._silent_tests,
            loss=self.losses.at_end(self.iteration or 0),
        )


def _cost_digits(gigamacs: float | None) -> float | None:
    if gigamacs is None:
        return None
    return round(gigamacs, 4) if gigamacs >= 0.1 else float(f"{gigamacs:.4g}")


def _speed_digits(speed: float) -> float:
    return round(speed, 1) if speed >= 10 else float(f"{speed:.3g}")
