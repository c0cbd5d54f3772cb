"""``caffe test`` on PyTorch: a net's outputs batch by batch, and their means."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from caffe_jacinto.engines import caffe_log
from caffe_jacinto.engines.signals import Requests
from caffe_jacinto.engines.torch import log
from caffe_jacinto.engines.torch.distributed import Ranks, device_of_rank
from caffe_jacinto.engines.torch.inputs import Inputs
from caffe_jacinto.engines.torch.net import Net
from caffe_jacinto.engines.torch.precision import Precision
from caffe_jacinto.engines.torch.scoring import OnBatch, Scorer, named
from caffe_jacinto.engines.torch.setup import TEST
from caffe_jacinto.engines.torch.solver_file import read_net
from caffe_jacinto.engines.torch.sparse import Zeros
from caffe_jacinto.engines.torch.weight_file import load_weights
from caffe_jacinto.errors import FAILED, UserError
from caffe_jacinto.prototxt.dialects import Dialect


@dataclass(frozen=True)
class TestOptions:
    """What ``test`` is told."""

    __test__ = False  # its name is no sign for pytest

    model: Path
    weights: tuple[Path, ...]
    iterations: int = 50
    dialect: Dialect = Dialect.BVLC
    gpus: tuple[int, ...] = ()
    """It runs on the first; empty: on the CPU."""

    precision: Precision = "fp32"
    display_sparsity: bool = False
    workers: int | None = None
    level: int = 0
    stages: tuple[str, ...] = ()
    """Of the net's state, for layers with rules."""


def test(options: TestOptions) -> int:
    """Score ``options.weights`` over so many batches; returns the exit code.

    Raises:
        UserError: a file that is missing, damaged or not supported.
    """
    requests = Requests()
    definition = read_net(options.model, options.dialect, TEST)
    definition.state.level = options.level
    definition.state.stage.extend(options.stages)
    if options.iterations < 1:
        raise UserError(f"-iterations {options.iterations}: has to be at least 1")
    device = device_of_rank(options.gpus[:1])
    ranks = Ranks(device)
    with ExitStack() as stack:
        stack.callback(ranks.close)
        stack.enter_context(log.opened(ranks, options.gpus[:1], options.dialect, options.precision))
        inputs = stack.enter_context(
            Inputs(definition, TEST, str(options.model), device=device, seed=0, workers=options.workers)
        )
        net = Net(
            definition,
            TEST,
            options.dialect,
            where=str(options.model),
            seed=0,
            device=device,
            data_shapes=inputs.shapes,
        )
        log.net(definition, net)
        for path in options.weights:
            _, unused = load_weights(net, path)
            for name in unused:
                caffe_log.info(f"Ignoring source layer {name}")
        if options.display_sparsity:
            Zeros(net.convolutions(), [[] for _ in net.convolutions()], 0.0).display()
        caffe_log.info(f"Running for {options.iterations} iterations.")
        scorer = Scorer(net, inputs, ranks, options.precision)
        means = scorer.mean_outputs(options.iterations, lambda: requests.stop, _show_batch(net))
        if means is None:
            caffe_log.info("Test interrupted.")
            return FAILED
        _show_means(net, means)
    return 0


def _show_batch(net: Net) -> OnBatch:
    def show(batch: int, outputs: dict[str, Tensor]) -> None:
        values = torch.cat([outputs[name].reshape(-1).double() for name in net.output_names]).tolist()
        counts = [outputs[name].numel() for name in net.output_names]
        for name, numbers in named(net.output_names, counts, values).items():
            for number in numbers:
                caffe_log.info(f"Batch {batch}, {name} = {caffe_log.number(number)}")

    return show


def _show_means(net: Net, means: dict[str, list[float]]) -> None:
    weights = net.loss_weights
    loss = sum(weights.get(name, 0.0) * sum(values) for name, values in means.items())
    caffe_log.info(f"Loss: {caffe_log.number(loss)}")
    for name, values in means.items():
        for value in values:
            weight = weights.get(name, 0.0)
            part = (
                f" (* {caffe_log.number(weight)} = {caffe_log.number(weight * value)} loss)" if weight else ""
            )
            caffe_log.info(f"{name} = {caffe_log.number(value)}{part}")
