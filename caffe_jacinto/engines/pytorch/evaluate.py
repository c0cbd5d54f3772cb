"""Networks that are not trained: the test nets of a training, ``caffe test`` and ``caffe time``."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from math import prod

import torch
from torch import Tensor

from caffe_jacinto.common.errors import FAILED
from caffe_jacinto.common.files import read_text
from caffe_jacinto.common.processes import StopRequests
from caffe_jacinto.engines.caffe_log import CaffeLog, number, weighted
from caffe_jacinto.engines.pytorch.batch_norm import Statistics
from caffe_jacinto.engines.pytorch.debug_info import DebugInfo, watched
from caffe_jacinto.engines.pytorch.distributed import Ranks, device_of_rank, open_log
from caffe_jacinto.engines.pytorch.engine import Options
from caffe_jacinto.engines.pytorch.feed import Inputs
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.engines.pytorch.precision import autocast
from caffe_jacinto.engines.pytorch.pruner import TorchPruner
from caffe_jacinto.engines.pytorch.qat import QuantizedTest, QuantizedTraining
from caffe_jacinto.engines.pytorch.quantized import MovingPasses, moving_passes
from caffe_jacinto.engines.pytorch.snapshot import load_weights
from caffe_jacinto.prototxt.solver import TEST, TRAIN, SolverFile, parse_net_in
from caffe_jacinto.quantization.fork_settings import ForkSettings, tested_network

WARM_UP = 2
"""Passes before the clock runs: the first ones choose how to compute."""

OnBatch = Callable[[int, dict[str, list[float]]], None]
"""Given the number of a batch and its outputs, in order."""


class Evaluator:
    """A net of the test phase and its data."""

    def __init__(
        self,
        net: Net,
        inputs: Inputs,
        ranks: Ranks,
        precision: str,
        settings: ForkSettings | None = None,
        trained: QuantizedTest | None = None,
    ) -> None:
        """``settings``: the net is tested in quantized values; then it must not be fused. ``trained``: the
        same, in those of quantization-aware training.

        Raises:
            UserError: a layer in ``settings`` that is not there, or weights that are not finite.
        """
        self.net, self._inputs, self._ranks, self._precision = net, inputs, ranks, precision
        self._settings = settings
        self._passes: MovingPasses | QuantizedTest | None = trained
        if settings is not None:
            self._passes = moving_passes(net, settings, net.where)
        inputs.fit(net)

    def mean_outputs(
        self, batches: int, stop: Callable[[], bool], on_batch: OnBatch | None = None
    ) -> dict[str, list[float]] | None:
        """The net's outputs by name, each number averaged over the first ``batches`` batches of the data.

        The ranks share the batches out; in quantized values, whose ranges move from batch to batch, each
        computes all. None: ``stop`` requested an end.
        """
        rank, size = self._ranks.rank, self._ranks.size
        if self._settings is not None:
            rank, size = 0, 1
            before = self._passes if isinstance(self._passes, MovingPasses) else None
            self._passes = moving_passes(self.net, self._settings, self.net.where, before)
        elif isinstance(self._passes, QuantizedTest):
            self._passes.begin()
        self._inputs.start_at(rank, size, len(range(rank, batches, size)))
        counts = [prod(self.net.shapes[name]) for name in self.net.output_names]
        sums = torch.zeros(sum(counts), dtype=torch.float64, device=self.net.device)
        stopped = False
        for first in range(0, batches, size):
            # The ranks meet at each batch only where they show it.
            if stop() if on_batch is None else any(self._ranks.any(stop())):
                stopped = True
                break
            values = self._outputs_of_a_batch() if first + rank < batches else torch.zeros_like(sums)
            sums += values
            if on_batch is not None:
                shown = self._of_each_rank(values, rank, size)
                for number, outputs in zip(range(first, batches), shown, strict=False):
                    on_batch(number, named(self.net.output_names, counts, outputs))
        if any(self._ranks.any(stopped)):
            return None
        flat = sums.tolist()
        self.net.check_indices()
        totals = flat if self._settings is not None else self._ranks.total(flat)
        means = [total / batches for total in totals]
        return named(self.net.output_names, counts, means)

    def _outputs_of_a_batch(self) -> Tensor:
        """The outputs for the next batch, in float64, one after the other."""
        with torch.inference_mode(), autocast(self.net.device, self._precision):
            given = self._inputs.batch()
            outputs = self._passes.run(given) if self._passes else self.net(given).outputs
            return torch.cat([outputs[name].reshape(-1).double() for name in self.net.output_names])

    def _of_each_rank(self, values: Tensor, rank: int, size: int) -> list[list[float]]:
        """The ``values`` of every rank, which have the same number of them each."""
        own, nothing = values.tolist(), [0.0] * values.numel()
        if size == 1:
            return [own]
        rows = [own if number == rank else nothing for number in range(size)]
        whole = iter(self._ranks.total([value for row in rows for value in row]))
        return [list(islice(whole, len(own))) for _ in range(size)]


def named(names: Sequence[str], counts: Sequence[int], values: Sequence[float]) -> dict[str, list[float]]:
    """The numbers of each output, by its name; ``counts`` are how many each has."""
    numbers = iter(values)
    return {name: list(islice(numbers, count)) for name, count in zip(names, counts, strict=True)}


class TestNets:
    """The test nets of a solver, with the weights of the net that is trained."""

    __test__ = False  # not a test, whatever pytest makes of its name

    def __init__(
        self,
        solver: SolverFile,
        train_net: Net,
        inputs: list[Inputs],
        statistics: Statistics,
        ranks: Ranks,
        precision: str,
        log: CaffeLog,
        quantized: QuantizedTraining | None = None,
    ) -> None:
        """``inputs`` has those of each test net, in order; ``statistics`` are those of the train net.

        ``quantized``: the training, where they are tested in quantized values.

        Raises:
            UserError: a net that cannot be built, or layers that do not fit the train net's.
        """
        self._statistics, self._log = statistics, log
        self._computes_loss = bool(solver.parameters.test_compute_loss)
        self._tests: list[tuple[Evaluator, int, DebugInfo | None]] = []
        for index, (test, fed) in enumerate(zip(solver.tests, inputs, strict=True)):
            log.info(f"Creating test net (#{index}) specified by {test.source}")
            definition, settings = tested_network(test.definition, solver.dialect, str(test.file))
            net = Net(
                definition,
                TEST,
                solver.dialect,
                where=str(test.file),
                seed=0,
                device=train_net.device,
                data_shapes=fed.shapes,
                fused=settings is None and quantized is None,
            )
            net.share_with(train_net)
            net.definition = test.definition
            net.write_to(log, quantized.fields if quantized is not None else "")
            trained = None if quantized is None else QuantizedTest(quantized, net)
            evaluator = Evaluator(net, fed, ranks, precision, settings, trained)
            debug = DebugInfo(net, log) if solver.parameters.debug_info and ranks.first else None
            self._tests.append((evaluator, test.batches, debug))
        self._quantized = quantized is not None

    def __len__(self) -> int:
        return len(self._tests)

    def test(
        self,
        iteration: int,
        stop: Callable[[], bool],
        recalibrated_over: int = 0,
        *,
        averaged: bool = False,
    ) -> bool:
        """Log the outputs of every net, averaged over its batches. False: ``stop`` requested an end.

        ``recalibrated_over``: the batches that the statistics were recalibrated over; 0: running averages.
        ``averaged``: the weights are the average of those that are trained; the log numbers the nets on.
        """
        if not self._tests:
            return True
        self._statistics.share()
        for index, (evaluator, batches, debug) in enumerate(self._tests):
            number_in_log = index + len(self) * averaged
            self._log.test_begins(
                iteration,
                number_in_log,
                recalibrated_over,
                averaged=averaged,
                quantized=self._quantized,
            )
            with watched(debug):
                found = evaluator.mean_outputs(batches, stop)
            if found is None:
                self._log.test_interrupted()
                return False
            if self._computes_loss:
                weights = evaluator.net.loss_weights
                self._log.test_loss(sum(weight * sum(found[name]) for name, weight in weights.items()))
            self._log.outputs("Test", found, evaluator.net.loss_weights)
        return True


def test(options: Options) -> int:
    """Evaluate ``options.weights`` on ``options.model``; returns the exit code.

    Raises:
        UserError: a file that is missing, damaged or not supported.
    """
    requests = StopRequests()
    where, gpus = str(options.model), options.gpus or ()
    definition = parse_net_in(read_text(options.model), options.dialect, where, TEST)
    definition.state.level = options.level
    definition.state.stage.extend(options.stage)
    bare, settings = tested_network(definition, options.dialect, where)
    device = device_of_rank(gpus, options)
    ranks = Ranks(device)
    with ExitStack() as stack:
        stack.callback(ranks.close)
        log = stack.enter_context(open_log(ranks, gpus, options))
        inputs = stack.enter_context(
            Inputs(bare, TEST, where, device=device, seed=0, workers=options.workers)
        )
        for note in inputs.notes:
            log.info(note)
        shapes = inputs.shapes
        net = Net(
            bare,
            TEST,
            options.dialect,
            where=where,
            seed=0,
            device=device,
            data_shapes=shapes,
            fused=settings is None,
        )
        net.definition = definition
        net.write_to(log)
        for path in options.weights:
            _, unused = load_weights(net, path)
            for name in unused:
                log.info(f"Ignoring source layer {name}")
        if options.display_sparsity:
            log.sparsity(*TorchPruner(net, log.info).counts())
        log.info(f"Running for {options.iterations} iterations.")
        evaluator = Evaluator(net, inputs, ranks, options.precision, settings)
        means = evaluator.mean_outputs(options.iterations, lambda: requests.stop, _show_batch(log))
        if means is None:
            log.test_interrupted()
            return FAILED
        weights = net.loss_weights
        loss = sum(weights.get(name, 0.0) * sum(values) for name, values in means.items())
        log.info(f"Loss: {number(loss)}")
        for name, values in means.items():
            for value in values:
                log.info(f"{name} = {weighted(value, weights.get(name, 0.0))}")
    return 0


def _show_batch(log: CaffeLog) -> OnBatch:
    def show(batch: int, outputs: dict[str, list[float]]) -> None:
        for name, numbers in outputs.items():
            for value in numbers:
                log.info(f"Batch {batch}, {name} = {number(value)}")

    return show


def time_net(options: Options) -> int:
    """Time the train phase of ``options.model``, as ``caffe time`` does, and log it in its words; returns 0.

    Raises:
        UserError: a file that is missing, damaged or not supported.
    """
    where, gpus, iterations = str(options.model), options.gpus[:1] if options.gpus else (), options.iterations
    device = device_of_rank(gpus, options)
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
                tops = step(*given)
            self._forward[step.name] += self._now() - started
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
