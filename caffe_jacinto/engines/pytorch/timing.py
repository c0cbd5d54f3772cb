"""``caffe time`` on PyTorch: how long each layer takes, forward and backward."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from caffe_jacinto.common.files import read_text
from caffe_jacinto.engines.caffe_log import CaffeLog
from caffe_jacinto.engines.pytorch.distributed import Ranks, device_of_rank, open_log
from caffe_jacinto.engines.pytorch.engine import Options
from caffe_jacinto.engines.pytorch.evaluate import autocast
from caffe_jacinto.engines.pytorch.feed import Inputs
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.prototxt.solver import TRAIN, parse_net_in

WARM_UP = 2
"""Passes before the clock runs: the first ones choose how to compute."""


def time_net(options: Options) -> int:
    """Time the train phase of ``options.model``, as ``caffe time`` does, and log it in its words; returns 0.

    Raises:
        UserError: a file that is missing, damaged or not supported.
    """
    where, gpus, iterations = str(options.model), options.gpus[:1] if options.gpus else (), options.iterations
    device = device_of_rank(gpus)
    definition = parse_net_in(read_text(options.model), options.dialect, where, TRAIN)
    with (
        open_log(Ranks(device), gpus, options) as log,
        Inputs(definition, TRAIN, where, device=device, seed=0, workers=None) as inputs,
    ):
        shapes = inputs.shapes
        net = Net(definition, TRAIN, options.dialect, where=where, seed=0, device=device, data_shapes=shapes)
        inputs.fit(net)
        inputs.start_at(0)
        timer = _Timer(net, device, options.precision)
        for _ in range(WARM_UP):
            timer.run(inputs.batch())
        timer.reset()
        log.info("*** Benchmark begins ***")
        log.info(f"Testing for {iterations} iterations.")
        for iteration in range(1, iterations + 1):
            started = time.perf_counter()
            timer.run(inputs.batch())
            milliseconds = 1000 * (time.perf_counter() - started)
            log.info(f"Iteration: {iteration} forward-backward time: {milliseconds:.4g} ms.")
        timer.write_to(log, iterations)
    return 0


class _Timer:
    """Runs a net layer by layer: each forward, then each backward in reverse, as Caffe times them."""

    def __init__(self, net: Net, device: torch.device, precision: str) -> None:
        self._net, self._device, self._precision = net, device, precision
        self.reset()

    def reset(self) -> None:
        """Forget what was timed so far."""
        self._forward: dict[str, float] = defaultdict(float)
        self._backward: dict[str, float] = defaultdict(float)

    def run(self, inputs: Mapping[str, Tensor]) -> None:
        """One pass forward and backward."""
        values, done = dict(inputs), []
        for step in self._net.steps:
            given = [self._cut(values[name]) for name in step.bottoms]
            started = self._now()
            with autocast(self._device, self._precision):
                made = step.forward(*given)
            self._forward[step.name] += self._now() - started
            tops = made if isinstance(made, tuple) else (made,)
            values.update(zip(step.tops, tops, strict=True))
            done.append((step.name, tops))
        for name, tops in reversed(done):
            learning = [top for top in tops if top.requires_grad]
            started = self._now()
            if learning:
                torch.autograd.backward(learning, [torch.ones_like(top) for top in learning])
            self._backward[name] += self._now() - started
        for _, _, blob in self._net.blobs:
            blob.tensor.grad = None

    def write_to(self, log: CaffeLog, iterations: int) -> None:
        """Log the averages in ``caffe time``'s words."""
        log.info("Average time per layer: ")
        for step in self._net.steps:
            for direction, spent in (("forward", self._forward), ("backward", self._backward)):
                log.info(f"{step.name:>10}\t{direction}: {1000 * spent[step.name] / iterations:.6g} ms.")
        passes = [sum(spent.values()) for spent in (self._forward, self._backward)]
        log.info(f"Average Forward pass: {1000 * passes[0] / iterations:.6g} ms.")
        log.info(f"Average Backward pass: {1000 * passes[1] / iterations:.6g} ms.")
        log.info(f"Average Forward-Backward: {1000 * sum(passes) / iterations:.6g} ms.")
        log.info(f"Total Time: {1000 * sum(passes):.6g} ms.")
        log.info("*** Benchmark ends ***")

    def _cut(self, value: Tensor) -> Tensor:
        """A blob whose gradient is taken, but not passed on to the layer before."""
        return value.detach().requires_grad_(value.is_floating_point() and value.requires_grad)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
