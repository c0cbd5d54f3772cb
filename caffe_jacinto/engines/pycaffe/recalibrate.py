"""Recalibrate batch-norm statistics, run the final test, and mark a stage complete.

    python -m caffe_jacinto.engines.pycaffe.recalibrate -pycaffe DIR -solver solver.prototxt
        -weights final.caffemodel [-batches 30] [-gpu 0]

Running averages lag behind weights that change fast: a network that trains well can test at chance.
Recalibrated statistics are averages over training batches with the weights as they are.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from caffe_jacinto.common.arguments import Parser, whole_number
from caffe_jacinto.common.errors import RunFailed, run_command
from caffe_jacinto.common.files import sync_folder
from caffe_jacinto.common.processes import StopRequests
from caffe_jacinto.engines.caffe_log import CaffeLog
from caffe_jacinto.engines.pycaffe.net import TestNets, start_caffe, use_device
from caffe_jacinto.engines.snapshots import final_is_complete, iteration_of, mark_complete
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.solver import SolverFile, read_solver


def complete_stage(
    net: Any,
    tests: TestNets,
    final_weights: Path,
    batches: int,
    requests: StopRequests,
    frozen: Collection[str],
    log: CaffeLog,
) -> bool:
    """Recalibrate ``net``, put its statistics into ``final_weights``, test, and mark the stage complete.

    ``net`` is in the TRAIN phase and has the final weights; the statistics become averages over ``batches``.
    Batch-norm layers that are ``frozen`` keep their statistics. False: a request to stop came first.

    After a kill at any moment it can be repeated: nothing of the old statistics goes into the new, and the
    other weights stay as they are.
    """
    statistics = _statistics(net, frozen)
    if batches and not statistics:
        log.info("No batch-norm statistics to recalibrate")
    if batches and statistics:
        log.info(
            f"Recalibrating the statistics of {len(statistics)} batch-norm layers over {batches} batches"
        )
        if not _recalibrate(statistics, batches, net.forward, requests):
            return False
    if batches:
        _replace_weights(net, final_weights, log)
    tests.test(iteration_of(final_weights), requests, batches if statistics else 0)
    if requests.stop:
        return False
    mark_complete(final_weights, batches)
    return True


class TestStatistics:
    """Recalibrated statistics for the tests within a stage, which leave no trace in its training.

    The batches go through a network of their own, with a place of its own in the data, that shares the blobs
    of the training network. It lives in a thread of its own, since Caffe keeps random numbers for each
    thread: building it and running it draws none of training's.
    """

    __test__ = False  # not a test, whatever pytest makes of its name

    def __init__(
        self, caffe: Any, solver: SolverFile, train_net: Any, batches: int, gpus: Sequence[int], log: CaffeLog
    ) -> None:
        self._statistics = _statistics(train_net, solver.frozen_layers())
        self._thread = ThreadPoolExecutor(max_workers=1)
        self.batches = batches if self._statistics else 0
        """That the statistics are recalibrated over; 0: the network has none."""

        def build() -> Any:
            use_device(caffe, gpus)
            if solver.parameters.random_seed >= 0:
                caffe.set_random_seed(solver.parameters.random_seed)
            net = caffe.Net(str(solver.train_file), caffe.TRAIN)
            net.share_with(train_net)
            return net

        if self.batches:
            log.info(f"Creating net for test statistics from train_net file: {solver.train_file}")
            self._net = self._thread.submit(build).result()

    @contextmanager
    def lent(self, requests: StopRequests) -> Iterator[None]:
        """While inside, the training network has recalibrated statistics; then its own again."""
        own = [[blob.data.copy() for blob in layer.blobs] for layer in self._statistics]
        try:
            self._thread.submit(
                _recalibrate, self._statistics, self.batches, lambda: self._net.forward(), requests
            ).result()
            yield
        finally:
            for layer, values in zip(self._statistics, own, strict=True):
                for blob, value in zip(layer.blobs, values, strict=True):
                    blob.data[...] = value


def _statistics(net: Any, frozen: Collection[str]) -> list[Any]:
    """The batch-norm layers of ``net`` whose statistics are not frozen."""
    named = zip(net._layer_names, net.layers, strict=True)
    return [layer for name, layer in named if layer.type == "BatchNorm" and name not in frozen]


def _recalibrate(
    layers: Sequence[Any], batches: int, forward: Callable[[], object], requests: StopRequests
) -> bool:
    """Set the statistics to averages over ``batches`` passes. False: a request to stop came."""
    for layer in layers:
        # Sums of mean and variance, and their weight: from zero, they hold nothing of the past.
        for blob in layer.blobs:
            blob.data[...] = 0
    for _ in range(batches):
        if requests.stop:
            return False
        forward()
    return True


def _replace_weights(net: Any, final_weights: Path, log: CaffeLog) -> None:
    log.info(f"Snapshotting to binary proto file {final_weights}")
    descriptor, beside = tempfile.mkstemp(prefix=".recalibrated.", dir=final_weights.parent)
    try:
        net.save(beside)
        os.fsync(descriptor)
        os.fchmod(descriptor, final_weights.stat().st_mode & 0o777)
        Path(beside).replace(final_weights)
    finally:
        os.close(descriptor)
        Path(beside).unlink(missing_ok=True)
    sync_folder(final_weights.parent)


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
            f"{arguments.weights} and its solver state are not there whole: "
            "training stopped before its last iteration; go on with it from the newest snapshot"
        )
    requests = StopRequests()
    caffe, log = start_caffe(arguments.pycaffe, arguments.gpu)
    requests.install()
    solver = read_solver(arguments.solver, Dialect.BVLC)
    if solver.parameters.random_seed >= 0:
        caffe.set_random_seed(solver.parameters.random_seed)
    net = caffe.Net(str(solver.train_file), caffe.TRAIN, weights=str(arguments.weights))
    tests = TestNets(caffe, solver, net, log)
    frozen = solver.frozen_layers()
    if complete_stage(net, tests, arguments.weights, arguments.batches, requests, frozen, log):
        log.info(f"{arguments.weights}: the stage is complete")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.engines.pycaffe.recalibrate", main))
