"""Hand a stage's final weights over: batch-norm statistics estimated anew, the final test, the record.

    python -m caffe_jacinto.engines.pycaffe.recalibrate -pycaffe DIR -solver solver.prototxt
        -weights final.caffemodel [-batches 30] [-gpu 0]

Running averages lag behind weights that change fast, so that a network that trains well can test at chance.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from caffe_jacinto.common.errors import RunFailed, run_command
from caffe_jacinto.common.files import sync_folder
from caffe_jacinto.common.processes import StopRequests
from caffe_jacinto.engines import caffe_log
from caffe_jacinto.engines.pycaffe.net import TestNets, start_caffe
from caffe_jacinto.engines.pycaffe.solver_file import read_solver
from caffe_jacinto.engines.snapshots import final_is_complete, iteration_of, record_handover
from caffe_jacinto.prototxt.dialects import Dialect


def hand_over(
    net: Any,
    tests: TestNets,
    final_weights: Path,
    batches: int,
    requests: StopRequests,
    frozen: Collection[str] = (),
) -> bool:
    """Estimate the statistics of ``net`` (in the TRAIN phase, with the final weights) over so many batches,
    put them into ``final_weights``, test, and record that the weights are ready.

    Batch-norm layers that are ``frozen`` keep their statistics.

    Killed at any moment, it can be done again: nothing of the old statistics goes into the new, and the other
    weights stay as they are. False: a request to stop came first, and there is no record.
    """
    if batches and not _reestimate(net, batches, requests, frozen):
        return False
    if batches:
        _replace_weights(net, final_weights)
    tests.test(iteration_of(final_weights), requests)
    if requests.stop:
        return False
    record_handover(final_weights, batches)
    return True


def _reestimate(net: Any, batches: int, requests: StopRequests, frozen: Collection[str]) -> bool:
    """Set the batch-norm statistics of ``net`` to averages over the next ``batches`` training batches."""
    named = zip(net._layer_names, net.layers, strict=True)
    layers = [layer for name, layer in named if layer.type == "BatchNorm" and name not in frozen]
    if not layers:
        caffe_log.info("No batch-norm statistics to re-estimate")
        return True
    caffe_log.info(f"Re-estimating the statistics of {len(layers)} batch-norm layers over {batches} batches")
    for layer in layers:
        # Sums of mean and variance, and their weight: from zero, they hold nothing of the past.
        for blob in layer.blobs:
            blob.data[...] = 0
    for _ in range(batches):
        if requests.stop:
            return False
        net.forward()
    return True


def _replace_weights(net: Any, final_weights: Path) -> None:
    caffe_log.info(f"Snapshotting to binary proto file {final_weights}")
    descriptor, beside = tempfile.mkstemp(prefix=".reestimated.", dir=final_weights.parent)
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
    parser = argparse.ArgumentParser(prog="reestimate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-pycaffe", type=Path, required=True)
    parser.add_argument("-solver", type=Path, required=True)
    parser.add_argument("-weights", type=Path, required=True)
    parser.add_argument("-batches", type=int, default=30)
    parser.add_argument("-gpu", type=int, action="append", default=[])
    arguments = parser.parse_args(argv)
    if not final_is_complete(arguments.weights, Dialect.BVLC):
        raise RunFailed(
            f"{arguments.weights} and its solver state are not there whole: "
            "training stopped before its last iteration; go on with it from the newest snapshot"
        )
    requests = StopRequests()
    caffe = start_caffe(arguments.pycaffe, tuple(arguments.gpu))
    requests.install()
    solver = read_solver(arguments.solver)
    if solver.parameters.random_seed >= 0:
        caffe.set_random_seed(solver.parameters.random_seed)
    net = caffe.Net(solver.train_net, caffe.TRAIN, weights=str(arguments.weights))
    tests = TestNets(caffe, solver, net)
    frozen = solver.frozen_layers()
    if hand_over(net, tests, arguments.weights, arguments.batches, requests, frozen):
        caffe_log.info(f"{arguments.weights} is ready to be handed over")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("caffe_jacinto.engines.pycaffe.recalibrate", main))
