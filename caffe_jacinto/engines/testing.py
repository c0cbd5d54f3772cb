"""A solver's test nets, run as Caffe runs them, on the weights of the train net."""

from __future__ import annotations

from typing import Any

from caffe_jacinto.engines import caffe_log
from caffe_jacinto.engines.pycaffe import output_values, outputs
from caffe_jacinto.engines.signals import Requests
from caffe_jacinto.engines.solver_file import SolverFile


class TestNets:
    """The test nets of ``solver``, sharing the weights of ``train_net``."""

    __test__ = False  # its name is no sign for pytest

    def __init__(self, caffe: Any, solver: SolverFile, train_net: Any) -> None:
        self._train_net = train_net
        self._nets = []
        for index, (file, batches) in enumerate(solver.test_nets):
            caffe_log.info(f"Creating test net (#{index}) specified by test_net file: {file}")
            self._nets.append((caffe.Net(file, caffe.TEST), batches))

    def test(self, iteration: int, requests: Requests) -> None:
        """Log the outputs of every net, averaged over its batches; a request to stop ends it."""
        for index, (net, batches) in enumerate(self._nets):
            caffe_log.info(f"Iteration {iteration}, Testing net (#{index})")
            net.share_with(self._train_net)
            sums = [0.0] * len(outputs(net))
            for _ in range(batches):
                if requests.stop:
                    caffe_log.info("Test interrupted.")
                    return
                net.forward()
                sums = [total + value for total, value in zip(sums, output_values(net), strict=True)]
            for number, (output, total) in enumerate(zip(outputs(net), sums, strict=True)):
                caffe_log.net_output("Test", number, output.name, total / batches, output.loss_weight)
