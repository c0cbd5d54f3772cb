"""``caffe time`` on PyTorch: how long each layer takes, forward and backward."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from caffe_jacinto.engines import caffe_log
from caffe_jacinto.engines.pytorch import log
from caffe_jacinto.engines.pytorch.distributed import Ranks, device_of_rank
from caffe_jacinto.engines.pytorch.evaluate import Precision, autocast
from caffe_jacinto.engines.pytorch.feed import Inputs
from caffe_jacinto.engines.pytorch.layer_setup import TRAIN
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.engines.pytorch.solver_file import read_net
from caffe_jacinto.prototxt.dialects import Dialect

WARM_UP = 2
"""Passes before the clock runs: the first ones choose how to compute."""


def time_net(
    model: Path, dialect: Dialect, gpus: tuple[int, ...], *, iterations: int, precision: Precision
) -> int:
    """Time the train phase of ``model``, as ``caffe time`` does, and log it in its words; returns 0.

    Raises:
        UserError: a file that is missing, damaged or not supported.
    """
    device = device_of_rank(gpus[:1])
    definition = read_net(model, dialect, TRAIN)
    with (
        log.opened(Ranks(device), gpus[:1], dialect, precision),
        Inputs(definition, TRAIN, str(model), device=device, seed=0, workers=None) as inputs,
    ):
        net = Net(
            definition, TRAIN, dialect, where=str(model), seed=0, device=device, data_shapes=inputs.shapes
        )
        inputs.fit(net)
        inputs.start_at(0)
        timer = _Timer(net, device, precision)
        for _ in range(WARM_UP):
            timer.run(inputs.batch())
        timer.reset()
        caffe_log.info("*** Benchmark begins ***")
        caffe_log.info(f"Testing for {iterations} iterations.")
        for iteration in range(1, iterations + 1):
            started = time.perf_counter()
            timer.run(inputs.batch())
            milliseconds = 1000 * (time.perf_counter() - started)
            caffe_log.info(f"Iteration: {iteration} forward-backward time: {milliseconds:.4g} ms.")
        timer.tell(iterations)
    return 0


class _Timer:
    """Runs a net layer by layer: each forward, then each backward in reverse, as Caffe times them."""

    def __init__(self, net: Net, device: torch.device, precision: Precision) -> None:
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
            learnt = [top for top in tops if top.requires_grad]
            started = self._now()
            if learnt:
                torch.autograd.backward(learnt, [torch.ones_like(top) for top in learnt])
            self._backward[name] += self._now() - started
        for _, _, blob in self._net.blobs:
            blob.tensor.grad = None

    def tell(self, iterations: int) -> None:
        """Log the averages in ``caffe time``'s words."""
        caffe_log.info("Average time per layer: ")
        for step in self._net.steps:
            for direction, spent in (("forward", self._forward), ("backward", self._backward)):
                caffe_log.info(
                    f"{step.name:>10}\t{direction}: {1000 * spent[step.name] / iterations:.6g} ms."
                )
        passes = [sum(spent.values()) for spent in (self._forward, self._backward)]
        caffe_log.info(f"Average Forward pass: {1000 * passes[0] / iterations:.6g} ms.")
        caffe_log.info(f"Average Backward pass: {1000 * passes[1] / iterations:.6g} ms.")
        caffe_log.info(f"Average Forward-Backward: {1000 * sum(passes) / iterations:.6g} ms.")
        caffe_log.info(f"Total Time: {1000 * sum(passes):.6g} ms.")
        caffe_log.info("*** Benchmark ends ***")

    def _cut(self, value: Tensor) -> Tensor:
        """A blob whose gradient is taken, but not passed on to the layer before."""
        return value.detach().requires_grad_(value.is_floating_point() and value.requires_grad)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
