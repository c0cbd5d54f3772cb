"""Test a net: its outputs, averaged over batches, as Caffe does it in training and by ``caffe test``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from math import prod

import torch
from torch import Tensor

from caffe_jacinto.engines import caffe_log
from caffe_jacinto.engines.torch import log
from caffe_jacinto.engines.torch.distributed import Ranks
from caffe_jacinto.engines.torch.inputs import Inputs
from caffe_jacinto.engines.torch.net import Net
from caffe_jacinto.engines.torch.precision import autocast
from caffe_jacinto.engines.torch.setup import TEST
from caffe_jacinto.engines.torch.solver_file import SolverFile

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
