"""``caffe test`` on PyTorch: a net's outputs batch by batch, and their means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from caffe_jacinto.common.errors import FAILED, UserError
from caffe_jacinto.common.processes import StopRequests
from caffe_jacinto.engines import caffe_log
from caffe_jacinto.engines.contract import Precision
from caffe_jacinto.engines.pytorch import log
from caffe_jacinto.engines.pytorch.distributed import Ranks, device_of_rank
from caffe_jacinto.engines.pytorch.feed import Inputs
from caffe_jacinto.engines.pytorch.layer_setup import TEST
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.engines.pytorch.pruner import Zeros
from caffe_jacinto.engines.pytorch.snapshot import load_weights
from caffe_jacinto.engines.pytorch.solver_file import SolverFile, read_net
from caffe_jacinto.prototxt.dialects import Dialect

__all__ = ["Precision", "autocast"]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which convolutions and inner products compute in bfloat16, if ``precision`` is bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


OnBatch = Callable[[int, dict[str, Tensor]], None]
"""Given the number of a batch and its outputs."""


class Scorer:
    """A net of the test phase and its data."""

    def __init__(self, net: Net, inputs: Inputs, ranks: Ranks, precision: str) -> None:
        self.net, self._inputs, self._ranks, self._precision = net, inputs, ranks, precision
        inputs.fit(net)

    def mean_outputs(
        self, batches: int, stop: Callable[[], bool], on_batch: OnBatch | None = None
    ) -> dict[str, list[float]] | None:
        """The net's outputs by name, each number averaged over the first ``batches`` batches of the data.

        The ranks share the batches out. None: ``stop`` asked for an end.
        """
        rank, size = self._ranks.rank, self._ranks.size
        mine = range(rank, batches, size)
        self._inputs.start_at(rank, size, len(mine))
        sums: list[Tensor] | None = None
        stopped = False
        with torch.inference_mode():
            for number in mine:
                if stop():
                    stopped = True
                    break
                with autocast(self.net.device, self._precision):
                    outputs = self.net(self._inputs.batch()).outputs
                values = [outputs[name].reshape(-1).double() for name in self.net.output_names]
                sums = values if sums is None else [a + b for a, b in zip(sums, values, strict=True)]
                if on_batch is not None:
                    on_batch(number, outputs)
        if any(self._ranks.any(stopped)):
            return None
        shapes = [self.net.shapes[name] for name in self.net.output_names]
        flat = torch.cat(sums).tolist() if sums else [0.0] * sum(map(prod, shapes))
        means = [total / batches for total in self._ranks.total(flat)]
        return named(self.net.output_names, [prod(shape) for shape in shapes], means)


def named(names: Sequence[str], counts: Sequence[int], values: Sequence[float]) -> dict[str, list[float]]:
    """The numbers of each output, by its name; ``counts`` are how many each has."""
    numbers = iter(values)
    return {name: list(islice(numbers, count)) for name, count in zip(names, counts, strict=True)}


class TestNets:
    """The test nets of a solver, with the weights of the net that is trained."""

    __test__ = False  # its name is no sign for pytest

    def __init__(
        self, solver: SolverFile, train_net: Net, inputs: list[Inputs], ranks: Ranks, precision: str
    ) -> None:
        """``inputs`` has those of each test net, in order.

        Raises:
            UserError: a net that cannot be built, or layers that do not fit the train net's.
        """
        self._train_net, self._ranks = train_net, ranks
        self._scorers = []
        for index, (test, fed) in enumerate(zip(solver.tests, inputs, strict=True)):
            caffe_log.info(f"Creating test net (#{index}) specified by test_net file: {test.file}")
            net = Net(
                test.definition,
                TEST,
                solver.dialect,
                where=str(test.file),
                seed=0,
                device=train_net.device,
                data_shapes=fed.shapes,
            )
            net.share_with(train_net)
            log.net(test.definition, net)
            self._scorers.append((Scorer(net, fed, ranks, precision), test.batches))

    def test(self, iteration: int, stop: Callable[[], bool]) -> bool:
        """Log the outputs of every net, averaged over its batches. False: ``stop`` asked for an end."""
        if not self._scorers:
            return True
        self._ranks.copy_from_first(statistics(self._train_net))
        for index, (scorer, batches) in enumerate(self._scorers):
            caffe_log.info(f"Iteration {iteration}, Testing net (#{index})")
            found = scorer.mean_outputs(batches, stop)
            if found is None:
                caffe_log.info("Test interrupted.")
                return False
            log.outputs("Test", found, scorer.net.loss_weights)
        return True


def statistics(net: Net) -> list[Tensor]:
    """The batch-norm statistics of ``net``, which every rank has of its own batches."""
    return [blob.tensor for name in net.batch_norms() for blob in net.layer_blobs.get(name, [])[:3]]


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
    requests = StopRequests()
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
