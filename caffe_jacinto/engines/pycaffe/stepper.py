"""Train a stage of stock Caffe with zeros held in place: its solver, stepped through pycaffe.

    python -m caffe_jacinto.engines.pycaffe.stepper -pycaffe DIR -solver solver.prototxt
        [-weights W.caffemodel | -snapshot S.solverstate] [-gpu 0]
        [-reestimate_batches 30] [-recalibrate_tests]
        -freeze_zeros | -sparsity_target 0.8 -sparsity_start_iter 20000 ...

Each iteration is one step of Caffe's own solver: learning rate, momentum, regularization and clipping are
Caffe's. Then the frozen weights are set to zero again, since momentum from before a threshold moves them, and
pycaffe gives no access to the momentum. Tests and snapshots are taken here, after that, not by the solver.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caffe_jacinto.caffemodel.hdf5 import is_hdf5
from caffe_jacinto.caffemodel.storage import stored_state
from caffe_jacinto.common.arguments import Parser
from caffe_jacinto.common.errors import UserError, run_command
from caffe_jacinto.common.processes import StopRequests
from caffe_jacinto.engines.caffe_log import CaffeLog
from caffe_jacinto.engines.contract import add_stage_arguments, pruning_settings
from caffe_jacinto.engines.pycaffe.net import (
    CaffePruner,
    TestNets,
    check_numbers,
    load_weights,
    loss,
    loss_weights,
    output_values,
    start_caffe,
)
from caffe_jacinto.engines.pycaffe.recalibrate import SideNet, Statistics, complete_stage
from caffe_jacinto.netspec.graph import messages_in
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.solver import (
    SolverFile,
    check_snapshot_folder,
    read_solver,
    require_network_files,
)
from caffe_jacinto.recipes.model import SparseSettings


@dataclass(frozen=True)
class Job:
    """A stage for the stepper."""

    solver: SolverFile
    weights: Path | None
    snapshot: Path | None
    sparse: SparseSettings | None
    """None: only hold the zeros that the weights have at the start."""

    reestimate_batches: int
    recalibrate_tests: bool = False
    inner_products: bool = False
    """Without ``sparse``: hold the zeros of inner products, too."""

    gpus: tuple[int, ...] = ()


class LossWatch:
    """The loss of each iteration, averaged over its passes, as Caffe's own display has it."""

    def __init__(self, net: Any, iter_size: int, average_over: int) -> None:
        self._net, self._iter_size = net, iter_size
        self._last_layer = len(net.layers) - 1
        self._passes = 0.0
        self._recent: deque[float] = deque(maxlen=average_over)
        net.after_forward(self._after_layer)

    def _after_layer(self, layer: int) -> None:
        if layer == self._last_layer:
            self._passes += loss(self._net)

    def end_iteration(self) -> float:
        """The loss of the iteration that ended."""
        value, self._passes = self._passes / self._iter_size, 0.0
        self._recent.append(value)
        return value

    @property
    def smoothed(self) -> float:
        """The mean of the last ``average_loss`` iterations."""
        return sum(self._recent) / len(self._recent)


class Stepper:
    """A stage in training."""

    def __init__(self, caffe: Any, job: Job, requests: StopRequests, log: CaffeLog) -> None:
        self.job, self.requests, self.log = job, requests, log
        self.parameters = job.solver.parameters
        self.solver = _stepped_solver(caffe, job.solver)
        self.net = self.solver.net
        self.tests = TestNets(caffe, job.solver, self.net, log)
        layers = messages_in(job.solver.train_net)
        self.pruner = CaffePruner(
            self.net, job.solver, layers, job.sparse, log, inner_products=job.inner_products
        )
        if not self.pruner.layers:
            raise UserError(f"{job.solver.train_file}: has no convolution whose zeros could be held")
        self._start()
        self.statistics = Statistics(self.net, job.solver.frozen_layers())
        self._test_batches = job.reestimate_batches if job.recalibrate_tests and self.statistics.layers else 0
        if self._test_batches:
            self.side = SideNet(caffe, job.solver, self.net, job.gpus, log)
        self.losses = LossWatch(self.net, self.parameters.iter_size, max(self.parameters.average_loss, 1))
        if self.parameters.clip_gradients > 0 or (job.sparse and job.sparse.method == "rigl"):
            self.solver.add_callback(lambda: None, self._gradients_ready)
        self._displayed, self._display_time = self.iteration, time.monotonic()

    @property
    def iteration(self) -> int:
        """Updates done so far."""
        return int(self.solver.iter)

    def _start(self) -> None:
        """Load the weights that the stage starts from. Their zeros are held from here on, as in the fork."""
        job = self.job
        if job.snapshot:
            self.log.resumes_from(job.snapshot)
            self.solver.restore(str(job.snapshot))
            if is_hdf5(job.snapshot):  # its weights are not loaded: see `fit.in_binary_form`
                weights = job.snapshot.parent / Path(stored_state(job.snapshot).learned_net).name
                load_weights(self.net, weights, job.solver.train_net)
            self.pruner.load(job.snapshot)
        elif job.weights:
            self.log.starts_from(job.weights)
            load_weights(self.net, job.weights, job.solver.train_net)
            self.pruner.freeze_zeros()
        self._last_snapshot = self.iteration

    def train(self) -> None:
        """Train to the last iteration, or until a request to stop, and complete the stage."""
        self.log.optimization_starts(self.job.solver.train_file, self.parameters.lr_policy)
        self._display_sparsity()
        while self.iteration < self.parameters.max_iter and not self.requests.stop:
            self._display_and_test()
            if not self.requests.stop:
                self._iterate()
        if self._last_snapshot != self.iteration:
            self._snapshot()
        early = self.iteration < self.parameters.max_iter or not self._finish()
        self.log.optimization_ends(early=early)

    def _display_and_test(self) -> None:
        sparse, interval = self.job.sparse, self.parameters.test_interval
        if sparse and self.iteration and self.iteration % sparse.display == 0:
            self._display_sparsity()
        first = self.iteration == 0 and not self.parameters.test_initialization
        if interval and self.iteration % interval == 0 and not first:
            self._test()

    def _test(self) -> None:
        """A scheduled test, with recalibrated statistics if these are requested; training keeps its own."""
        batches = self._test_batches
        if not batches:
            self.tests.test(self.iteration, self._stop)
            return
        with self.statistics.kept():
            if self.statistics.recalibrate(batches, self.side.one_pass, self._stop):
                self.tests.test(self.iteration, self._stop, batches)

    def _stop(self) -> bool:
        return self.requests.stop

    def _iterate(self) -> None:
        iteration = self.iteration
        self.solver.step(1)
        value = self.losses.end_iteration()
        if not math.isfinite(value):
            self.log.fatal(f"Iteration {iteration}: the loss is not a number ({value})")
            raise SystemExit(1)
        self.pruner.zero_weights()
        if self.parameters.display and iteration % self.parameters.display == 0:
            self._display(iteration)
        self.pruner.after_update(iteration)
        due = self.parameters.snapshot and self.iteration % self.parameters.snapshot == 0
        if self.requests.take_snapshot() or due:
            self._snapshot()

    def _gradients_ready(self) -> None:
        """Before an update: the norm that clipping compares includes the gradients of frozen weights, and a
        weight that grows would have the momentum of gradients from when it was frozen. They have to be 0.
        """
        self.pruner.before_update(self.iteration)
        self.pruner.zero_gradients()

    def _snapshot(self) -> None:
        """Masks first and the solver state last: where that is complete, so is the rest."""
        check_numbers(self.net, self.job.solver.snapshot(self.iteration, ".caffemodel"), self.log)
        state = self.job.solver.snapshot(self.iteration, ".solverstate")
        state.unlink(missing_ok=True)
        self.pruner.save(state)
        self.solver.snapshot()
        self._last_snapshot = self.iteration

    def _finish(self) -> bool:
        """Caffe's last lines, then complete the stage; False if a request to stop came first."""
        self._display_sparsity()
        self.net.forward()
        self.log.last_loss(self.iteration, loss(self.net))
        final = self.job.solver.snapshot(self.iteration, ".caffemodel")
        batches, frozen = self.job.reestimate_batches, self.job.solver.frozen_layers()
        return complete_stage(self.net, self.tests, final, batches, frozen, self._stop, self.log)

    def _display(self, iteration: int) -> None:
        now = time.monotonic()
        self.log.train_progress(
            iteration, now - self._display_time, self.iteration - self._displayed, self.losses.smoothed
        )
        self._displayed, self._display_time = self.iteration, now
        self.log.outputs("Train", output_values(self.net), loss_weights(self.net))
        self.log.rate(iteration, self.job.solver.rate(iteration), self.parameters.momentum)

    def _display_sparsity(self) -> None:
        self.log.sparsity(*self.pruner.counts(), inner_products=self.pruner.inner_products)


def _stepped_solver(caffe: Any, solver: SolverFile) -> Any:
    """Caffe's solver for ``solver``, without the tests, snapshots and display that the stepper does itself.

    Caffe would do them at the right iterations, but before the frozen weights are set to zero.
    """
    from google.protobuf import text_format

    quiet = type(solver.parameters)()
    quiet.CopyFrom(solver.parameters)
    for field in ("test_net", "test_iter", "test_state", "test_interval", "display", "snapshot"):
        quiet.ClearField(field)
    if quiet.net:
        quiet.train_net = quiet.net
        quiet.ClearField("net")
    with tempfile.NamedTemporaryFile("w", suffix=".prototxt", encoding="utf-8") as file:
        file.write(text_format.MessageToString(quiet, as_utf8=True))
        file.flush()
        return caffe.get_solver(file.name)


def _parser() -> Parser:
    parser = Parser("stepper", (__doc__ or "").splitlines()[0])
    parser.add_argument("-pycaffe", type=Path, required=True, help="the folder that holds caffe/_caffe.so")
    parser.add_argument("-solver", type=Path, required=True)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("-weights", type=Path)
    start.add_argument("-snapshot", type=Path)
    parser.add_argument("-gpu", type=int, action="append", default=[])
    add_stage_arguments(parser, batches=30)
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    if (arguments.sparsity_target is None) != arguments.freeze_zeros:
        raise UserError("give either -sparsity_target with its settings, or -freeze_zeros")
    sparse = pruning_settings(arguments)
    if sparse is None and not (arguments.weights or arguments.snapshot):
        raise UserError("-freeze_zeros needs -weights or -snapshot: random weights have no zeros to hold")
    requests = StopRequests()
    caffe, log = start_caffe(arguments.pycaffe, arguments.gpu)
    requests.install()
    job = Job(
        solver=read_solver(arguments.solver, Dialect.BVLC),
        weights=arguments.weights,
        snapshot=arguments.snapshot,
        sparse=sparse,
        reestimate_batches=arguments.reestimate_batches,
        recalibrate_tests=arguments.recalibrate_tests,
        inner_products=arguments.sparsity_inner_products,
        gpus=tuple(arguments.gpu),
    )
    require_network_files(job.solver)
    check_snapshot_folder(job.solver)
    Stepper(caffe, job, requests, log).train()
    return 0


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.engines.pycaffe.stepper", main))
