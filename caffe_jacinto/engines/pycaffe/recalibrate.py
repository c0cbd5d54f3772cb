"""Recalibrate batch-norm statistics, run the final test, and mark a stage complete.

    python -m caffe_jacinto.engines.pycaffe.recalibrate -pycaffe DIR -solver solver.prototxt
        -weights final.caffemodel [-batches 30] [-gpu 0]

Running averages lag behind weights that change fast: a network that trains well can test at chance.
Recalibrated statistics are averages over training batches with the weights as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from caffe_jacinto.common.arguments import Parser, whole_number
from caffe_jacinto.common.errors import RunFailed, run_command
from caffe_jacinto.common.processes import StopRequests
from caffe_jacinto.engines.caffe_log import CaffeLog
from caffe_jacinto.engines.pycaffe.net import (
    TestNets,
    build_net,
    check_numbers,
    load_weights,
    save_weights,
    start_caffe,
    use_device,
)
from caffe_jacinto.engines.snapshots import final_is_complete, iteration_of, mark_complete
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.solver import SolverFile, read_solver, require_network_files


class Statistics:
    """The batch-norm statistics of a network in training."""

    def __init__(self, net: Any, frozen: Collection[str]) -> None:
        """Batch-norm layers of ``net`` that are ``frozen`` keep theirs."""
        named = zip(net._layer_names, net.layers, strict=True)
        found = [layer for name, layer in named if layer.type == "BatchNorm" and name not in frozen]
        self._blobs = [blob for layer in found for blob in layer.blobs]
        self.layers = len(found)
        """How many layers have statistics that move."""

    def recalibrate(self, batches: int, one_pass: Callable[[], object], stop: Callable[[], bool]) -> bool:
        """Set the statistics to averages over ``batches`` passes. False: ``stop`` requested an end."""
        for blob in self._blobs:
            # Sums of mean and variance, and their weight: from zero, they hold nothing of the past.
            blob.data[...] = 0
        for _ in range(batches):
            if stop():
                return False
            one_pass()
        return True

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put the statistics back, at the end, as they are now."""
        own = [blob.data.copy() for blob in self._blobs]
        try:
            yield
        finally:
            for blob, values in zip(self._blobs, own, strict=True):
                blob.data[...] = values


class SideNet:
    """A second network of the train phase, for passes that leave no trace in the training.

    It has a place of its own in the data, and shares the blobs of the training network. It lives in a thread
    of its own: Caffe keeps random numbers per thread, so building and running it draws none of training's.
    """

    def __init__(
        self, caffe: Any, solver: SolverFile, train_net: Any, gpus: Sequence[int], log: CaffeLog
    ) -> None:
        def build() -> Any:
            use_device(caffe, gpus)
            if solver.parameters.random_seed >= 0:
                caffe.set_random_seed(solver.parameters.random_seed)
            net = build_net(caffe, solver.train_file, solver.train_net)
            net.share_with(train_net)
            return net

        log.info(f"Creating net for test statistics from train_net file: {solver.train_file}")
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._net = self._thread.submit(build).result()

    def one_pass(self) -> None:
        """A pass forward over the next batch; it moves the batch-norm statistics and nothing else."""
        self._thread.submit(self._net.forward).result()


def complete_stage(
    net: Any,
    tests: TestNets,
    final_weights: Path,
    batches: int,
    frozen: Collection[str],
    stop: Callable[[], bool],
    log: CaffeLog,
) -> bool:
    """Recalibrate ``net``, put its statistics into ``final_weights``, test, and mark the stage complete.

    ``net`` is in the TRAIN phase and has the final weights. False: ``stop`` requested an end. After a kill at
    any moment it can be repeated: the other weights stay as they are.
    """
    statistics = Statistics(net, frozen)
    if batches:
        log.recalibrates(statistics.layers, batches)
        if statistics.layers and not statistics.recalibrate(batches, net.forward, stop):
            return False
        check_numbers(net, final_weights, log)
        log.writes_weights(final_weights)
        save_weights(net, final_weights)
    if not tests.test(iteration_of(final_weights), stop, batches if statistics.layers else 0):
        return False
    mark_complete(final_weights, batches)
    return True


def main(argv: Sequence[str]) -> int:
    parser = Parser("recalibrate", (__doc__ or "").splitlines()[0])
    parser.add_argument("-pycaffe", type=Path, required=True, help="the folder that holds caffe/_caffe.so")
    parser.add_argument("-solver", type=Path, required=True)
    parser.add_argument("-weights", type=Path, required=True)
    parser.add_argument("-batches", type=whole_number(0), default=30)
    parser.add_argument("-gpu", type=int, action="append", default=[])
    arguments = parser.parse_args(argv)
    if not final_is_complete(arguments.weights, Dialect.BVLC):
        raise RunFailed(
            f"{arguments.weights} or its solver state is missing or cut off: "
            "training stopped before its last iteration; resume it from the newest snapshot"
        )
    requests = StopRequests()
    caffe, log = start_caffe(arguments.pycaffe, arguments.gpu)
    requests.install()
    solver = read_solver(arguments.solver, Dialect.BVLC)
    require_network_files(solver)
    if solver.parameters.random_seed >= 0:
        caffe.set_random_seed(solver.parameters.random_seed)
    net = build_net(caffe, solver.train_file, solver.train_net)
    load_weights(net, arguments.weights, solver.train_net)
    tests = TestNets(caffe, solver, net, log)
    frozen = solver.frozen_layers()
    stop = lambda: requests.stop  # noqa: E731
    if complete_stage(net, tests, arguments.weights, arguments.batches, frozen, stop, log):
        log.info(f"{arguments.weights}: the stage is complete")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.engines.pycaffe.recalibrate", main))
