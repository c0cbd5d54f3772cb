"""One iteration: passes forward and backward, and the update; layer by layer, or as one CUDA graph.

Nothing here waits for the device. A network of this size runs a few hundred short kernels in each pass, and
starting them one by one takes longer than they do: on a GPU the whole iteration is recorded once and then
replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from caffe_jacinto.data.batches import random_numbers
from caffe_jacinto.engines.pytorch.copy_ahead import RawBatch
from caffe_jacinto.engines.pytorch.debug_info import DebugInfo, watched
from caffe_jacinto.engines.pytorch.distributed import Ranks
from caffe_jacinto.engines.pytorch.feed import Inputs
from caffe_jacinto.engines.pytorch.net import Net, NetResult
from caffe_jacinto.engines.pytorch.precision import autocast
from caffe_jacinto.engines.pytorch.pruner import TorchPruner
from caffe_jacinto.engines.pytorch.qat import QuantizedTraining
from caffe_jacinto.engines.pytorch.solvers import CaffeSolver

_EAGER_FIRST = 3
"""Iterations before one is recorded: the first ones choose algorithms and allocate memory."""


class Iteration:
    """Carries out the iterations of a training on this rank."""

    def __init__(
        self,
        net: Net | QuantizedTraining,
        inputs: Inputs,
        optimizer: CaffeSolver,
        pruner: TorchPruner,
        ranks: Ranks,
        *,
        seed: int,
        passes: int,
        precision: str,
        graph: bool,
    ) -> None:
        """``passes`` are those of one update (``iter_size``), ``seed`` determines all that is random.

        ``graph``: record an iteration where that is possible: on one GPU, and where no pass but the first
        draws random numbers.
        """
        self._net, self._inputs, self._optimizer, self._pruner = net, inputs, optimizer, pruner
        self._ranks, self._seed, self._passes, self._precision = ranks, seed, passes, precision
        self._learner = net
        """What runs in the passes of an update: ``net``, or one with its blobs for images of another size."""

        self._size: int | None = None
        self._model: Any = ranks.parallel(net)
        alone = net.device.type == "cuda" and ranks.size == 1
        self._records = graph and alone and not (net.draws and passes > 1) and net.recordable
        self._eager_left = _EAGER_FIRST
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded_holds = 0
        self._read: list[list[RawBatch]] = []
        """What the graph reads: for each pass, the batch of each Data layer."""

        self._result: NetResult | None = None
        """What the graph writes."""

        self.block = 0
        """The batches that all ranks together have seen."""

    def move_to(self, block: int) -> None:
        """Make batch number ``block`` the next one; it also determines that pass's random numbers."""
        self.block = block
        self._inputs.start_at(block + self._ranks.rank, self._ranks.size)

    def resize(self, net: Net, size: int) -> bool:
        """From now on update by images of ``size`` x ``size`` pixels, with a ``net`` of the same blobs.

        False: they were so before.
        """
        if size == self._size:
            return False
        self._size, self._learner = size, net
        self._graph = self._result = self._model = None  # what was made for the size before
        self._model = self._ranks.parallel(net)
        self._eager_left = _EAGER_FIRST
        return True

    def forward(self, debug: DebugInfo | None = None) -> NetResult:
        """One pass forward over this rank's next batch, its images in full size, without an update.

        ``debug`` watches it.
        """
        self._reseed(0, self._net)
        with watched(debug), autocast(self._net.device, self._precision):
            result: NetResult = self._net(self._inputs.batch())
        self.block += self._ranks.size
        return result

    def __call__(self, iteration: int, rate: float, debug: DebugInfo | None = None) -> NetResult:
        """Carry out ``iteration`` at the learning ``rate``; ``debug`` watches its passes.

        Returns the loss, averaged over the passes, and the outputs of the last pass.
        """
        self._optimizer.prepare(iteration, rate)
        if self._eager_left or not self._records or debug or self._pruner.needs_gradients(iteration):
            self._eager_left = max(self._eager_left - 1, 0)
            self._graph = self._result = None  # its memory, as much again as this iteration takes
            before_update = partial(self._pruner.before_update, iteration)
            reseed = partial(self._reseed, net=self._learner)
            result = self._compute(self._inputs.raw, reseed, before_update, debug)
        else:
            result = self._replay()
        self.block += self._passes * self._ranks.size
        return result

    def _compute(
        self,
        next_batch: Callable[[], Sequence[RawBatch]],
        before_pass: Callable[[int], None],
        before_update: Callable[[], None],
        debug: DebugInfo | None = None,
    ) -> NetResult:
        """The passes and the update, kernel by kernel."""
        loss: Tensor | None = None
        for number in range(self._passes):
            before_pass(number)
            # Only the last pass exchanges gradients between the ranks.
            with self._ranks.no_exchange(self._model) if number < self._passes - 1 else nullcontext():
                with watched(debug), autocast(self._net.device, self._precision):
                    result: NetResult = self._model(self._inputs.transformed(next_batch(), size=self._size))
                if result.loss.requires_grad:
                    result.loss.backward()
                if debug is not None:
                    debug.log_backward()
            part = result.loss.detach()
            loss = part if loss is None else loss + part
        assert loss is not None
        before_update()
        self._pruner.hold_gradients()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return NetResult(loss / self._passes, result.outputs)

    def _replay(self) -> NetResult:
        """As `_compute`, by the recorded graph."""
        self._take_batches()
        self._reseed(0, self._learner)
        if self._graph is None or self._recorded_holds != self._pruner.holds:
            self._record()
        assert self._graph is not None and self._result is not None
        self._graph.replay()
        # The next replay overwrites it.
        return NetResult(self._result.loss.clone(), self._result.outputs)

    def _take_batches(self) -> None:
        """Put the next batches where the graph reads them."""
        for number in range(self._passes):
            batches = self._inputs.raw()
            if number < len(self._read):
                for place, batch in zip(self._read[number], batches, strict=True):
                    torch._foreach_copy_(list(place), list(batch))
            else:
                self._read.append([RawBatch(*(part.clone() for part in batch)) for batch in batches])

    def _record(self) -> None:
        """Record one iteration, which changes nothing yet."""
        self._graph = self._result = None  # their memory first
        graph = torch.cuda.CUDAGraph()
        batches = iter(self._read)
        # Other threads copy batches and allocate memory meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._result = self._compute(lambda: next(batches), lambda number: None, lambda: None)
        self._graph, self._recorded_holds = graph, self._pruner.holds

    def _reseed(self, number: int, net: Net | QuantizedTraining) -> None:
        """Make what pass ``number`` of ``net`` draws (dropout, random data) follow from its place alone."""
        if net.draws:
            place = self.block + number * self._ranks.size + self._ranks.rank
            net.reseed(int(random_numbers(self._seed, place, "dropout").integers(1 << 62)))
