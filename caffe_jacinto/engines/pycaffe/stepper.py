"""Train a stage of stock Caffe with zeros held in place: its solver, stepped through pycaffe.

    python -m caffe_jacinto.engines.pycaffe.stepper -pycaffe DIR -solver solver.prototxt
        [-weights W.caffemodel | -snapshot S.solverstate] [-gpu 0] [-reestimate_batches 30]
        -freeze_zeros | -sparsity_target 0.8 -sparsity_start_iter 20000 ...

Each iteration is one step of Caffe's own solver, so that learning rate, momentum, regularization and clipping
are Caffe's. After it the frozen weights are set to zero again: momentum from before a threshold moves them
otherwise, and pycaffe does not show the momentum. Tests and snapshots are taken here, after that, not by the
solver.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caffe_jacinto.common.errors import UserError, run_command
from caffe_jacinto.common.processes import StopRequests
from caffe_jacinto.engines import caffe_log
from caffe_jacinto.engines.pycaffe.net import (
    Convolution,
    TestNets,
    convolutions,
    loss,
    output_values,
    outputs,
    start_caffe,
)
from caffe_jacinto.engines.pycaffe.recalibrate import hand_over
from caffe_jacinto.engines.pycaffe.solver_file import SolverFile, read_solver, stepped_solver
from caffe_jacinto.prototxt.solver import learning_rate
from caffe_jacinto.pruning.masks import Masks, load_masks, save_masks
from caffe_jacinto.pruning.options import add_sparse_options, sparse_settings
from caffe_jacinto.pruning.rule import is_pruned, is_step, layer_fraction, next_factor, small_weights
from caffe_jacinto.recipes.model import SparseSettings


@dataclass(frozen=True)
class Job:
    """What the stepper is told."""

    solver: SolverFile
    weights: Path | None
    snapshot: Path | None
    sparse: SparseSettings | None
    """None: only hold the zeros that the weights have at the start."""

    reestimate_batches: int


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

    def __init__(self, caffe: Any, job: Job, requests: StopRequests) -> None:
        self.job = job
        self.parameters = job.solver.parameters
        self.requests = requests
        self.solver = stepped_solver(caffe, job.solver)
        self.tests = TestNets(caffe, job.solver, self.solver.net)
        self.layers = convolutions(self.solver.net)
        self.frozen_layers = job.solver.frozen_layers()
        self.masks = Masks()
        self.factor = job.sparse.start_factor if job.sparse else 0.0
        self._start()
        self.losses = LossWatch(
            self.solver.net, self.parameters.iter_size, max(self.parameters.average_loss, 1)
        )
        if self.parameters.clip_gradients > 0:
            # Only here do the frozen weights' gradients count for the others: they are part of the norm.
            self.solver.add_callback(lambda: None, self._hold_gradients)
        self._displayed, self._display_time = self.iteration, time.monotonic()

    @property
    def iteration(self) -> int:
        """Updates done so far."""
        return int(self.solver.iter)

    def _start(self) -> None:
        """Load what the stage starts from; its zeros hold from here on, as the fork has it."""
        job = self.job
        if job.snapshot:
            caffe_log.info(f"Resuming from {job.snapshot}")
            self.solver.restore(str(job.snapshot))
            self.masks, self.factor = load_masks(job.snapshot, self.weights())
            if job.sparse:
                caffe_log.info(f"The ramp goes on from {caffe_log.number(self.factor)}")
        elif job.weights:
            caffe_log.info(f"Finetuning from {job.weights}")
            self.solver.net.copy_from(str(job.weights))
            self._freeze()
        self._last_snapshot = self.iteration

    def weights(self) -> dict[str, Any]:
        """The weights of each convolution by its name: views, to be changed in place."""
        return {layer.name: layer.weights for layer in self.layers}

    def _hold_gradients(self) -> None:
        self.masks.hold({layer.name: layer.gradients for layer in self.layers})

    def _freeze(self) -> None:
        self.masks.freeze_zeros(self.weights())
        caffe_log.info("All zero weights of convolution layers are frozen")

    def train(self) -> None:
        """Train to the last iteration, or until a request to stop, and hand the final weights over."""
        caffe_log.info("Starting Optimization")
        caffe_log.info(f"Solving {self.job.solver.train_net}")
        caffe_log.info(f"Learning Rate Policy: {self.parameters.lr_policy}")
        self._display_sparsity()
        while self.iteration < self.parameters.max_iter and not self.requests.stop:
            self._display_and_test()
            if not self.requests.stop:
                self._iterate()
        if self._last_snapshot != self.iteration:
            self._snapshot()
        if self.iteration < self.parameters.max_iter or not self._finish():
            caffe_log.info("Optimization stopped early.")
        caffe_log.info("Optimization Done.")

    def _display_and_test(self) -> None:
        sparse, interval = self.job.sparse, self.parameters.test_interval
        if sparse and self.iteration and self.iteration % sparse.display == 0:
            self._display_sparsity()
        first = self.iteration == 0 and not self.parameters.test_initialization
        if interval and self.iteration % interval == 0 and not first:
            self.tests.test(self.iteration, self.requests)

    def _iterate(self) -> None:
        iteration = self.iteration
        self.solver.step(1)
        value = self.losses.end_iteration()
        if not math.isfinite(value):
            caffe_log.fatal(f"Iteration {iteration}: the loss is not a number ({value})")
            raise SystemExit(1)
        self.masks.hold(self.weights())
        if self.parameters.display and iteration % self.parameters.display == 0:
            self._display(iteration)
        if self.job.sparse and is_step(self.job.sparse, iteration):
            self._take_threshold(self.job.sparse)
        due = self.parameters.snapshot and self.iteration % self.parameters.snapshot == 0
        if self.requests.take_snapshot() or due:
            self._snapshot()

    def _take_threshold(self, sparse: SparseSettings) -> None:
        factor = next_factor(sparse, self.factor, self._achieved())
        if factor is None:
            return
        self.factor = factor
        caffe_log.info(f"Finding and applying sparsity: {caffe_log.number(factor)}")
        learning = [layer for layer in self.layers if layer.name not in self.frozen_layers]
        apply_thresholds(learning, sparse, factor)
        self._freeze()

    def _achieved(self) -> float:
        zeros, counts = count_zeros(self.layers)
        return sum(zeros.values()) / max(sum(counts.values()), 1)

    def _snapshot(self) -> None:
        """Masks first and the solver state last: where that is whole, so is all the rest."""
        path = self.job.solver.snapshot(self.iteration, ".solverstate")
        path.unlink(missing_ok=True)
        save_masks(path, self.masks, self.factor)
        self.solver.snapshot()
        self._last_snapshot = self.iteration

    def _finish(self) -> bool:
        """The lines that Caffe ends with, and the hand-over; False if a request to stop came first."""
        self._display_sparsity()
        self.solver.net.forward()
        caffe_log.info(f"Iteration {self.iteration}, loss = {caffe_log.number(loss(self.solver.net))}")
        final = self.job.solver.snapshot(self.iteration, ".caffemodel")
        batches = self.job.reestimate_batches
        return hand_over(self.solver.net, self.tests, final, batches, self.requests, self.frozen_layers)

    def _display(self, iteration: int) -> None:
        now = time.monotonic()
        caffe_log.train_progress(
            iteration, now - self._display_time, self.iteration - self._displayed, self.losses.smoothed
        )
        self._displayed, self._display_time = self.iteration, now
        net = self.solver.net
        for index, (output, value) in enumerate(zip(outputs(net), output_values(net), strict=True)):
            caffe_log.net_output("Train", index, output.name, value, output.loss_weight)
        rate = caffe_log.number(learning_rate(self.parameters, iteration))
        caffe_log.info(
            f"Iteration {iteration}, lr = {rate}, m = {caffe_log.number(self.parameters.momentum)}"
        )

    def _display_sparsity(self) -> None:
        caffe_log.sparsity(*count_zeros(self.layers))


def apply_thresholds(layers: Sequence[Convolution], sparse: SparseSettings, factor: float) -> None:
    """Zero the small weights of every layer that takes part, in place."""
    for layer in layers:
        if is_pruned(layer.shape, layer.group):
            weights = layer.weights
            fraction = layer_fraction(layer.shape, layer.group, factor)
            small = small_weights(
                weights,
                fraction,
                maxratio=sparse.threshold_maxratio,
                value_max=sparse.threshold_value_max,
                by=sparse.by,
            )
            weights[small] = 0


def count_zeros(layers: Sequence[Convolution]) -> tuple[dict[str, int], dict[str, int]]:
    """Zeros and weights of each layer, by name."""
    import numpy as np

    weights = {layer.name: layer.weights for layer in layers}
    zeros = {name: values.size - int(np.count_nonzero(values)) for name, values in weights.items()}
    return zeros, {name: values.size for name, values in weights.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stepper", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-pycaffe", type=Path, required=True, help="the folder that holds caffe/_caffe.so")
    parser.add_argument("-solver", type=Path, required=True)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("-weights", type=Path)
    start.add_argument("-snapshot", type=Path)
    parser.add_argument("-gpu", type=int, action="append", default=[])
    parser.add_argument("-reestimate_batches", type=int, default=30)
    add_sparse_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    if (arguments.sparsity_target is None) != arguments.freeze_zeros:
        raise UserError("give either -sparsity_target with its settings, or -freeze_zeros")
    sparse = sparse_settings(arguments)
    if sparse is None and not (arguments.weights or arguments.snapshot):
        raise UserError("-freeze_zeros needs -weights or -snapshot: random weights have no zeros to hold")
    requests = StopRequests()
    caffe = start_caffe(arguments.pycaffe, tuple(arguments.gpu))
    requests.install()
    job = Job(
        solver=read_solver(arguments.solver),
        weights=arguments.weights,
        snapshot=arguments.snapshot,
        sparse=sparse,
        reestimate_batches=arguments.reestimate_batches,
    )
    Stepper(caffe, job, requests).train()
    return 0


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.engines.pycaffe.stepper", main))
