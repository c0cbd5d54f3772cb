"""``caffe train`` on PyTorch: one rank's part of it.

Each iteration is Caffe's: a test where one is due, passes forward and backward, one update, a snapshot where
one is due. Everything random and the place in the data follow from the seed and the number of images seen,
which snapshots hold: a resumed training gives the weights of one that never stopped.
"""

from __future__ import annotations

import math
import time
from collections import deque
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from caffe_jacinto.common.processes import StopRequests
from caffe_jacinto.engines.caffe_log import CaffeLog
from caffe_jacinto.engines.pytorch.average import average_file
from caffe_jacinto.engines.pytorch.distributed import FoundByAll, Ranks, device_of_rank, open_log
from caffe_jacinto.engines.pytorch.engine import Options
from caffe_jacinto.engines.pytorch.evaluate import named
from caffe_jacinto.engines.pytorch.memory import batch_that_fits
from caffe_jacinto.engines.pytorch.net import Net, NetResult
from caffe_jacinto.engines.pytorch.network_check import check_networks
from caffe_jacinto.engines.pytorch.qat import QuantizedTraining
from caffe_jacinto.engines.pytorch.snapshot import Place, save_weights, write_state
from caffe_jacinto.engines.pytorch.solver_fields import check_solver
from caffe_jacinto.engines.pytorch.stage import Stage
from caffe_jacinto.engines.pytorch.stage_check import check_quantized
from caffe_jacinto.engines.snapshots import mark_complete
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.solver import SolverFile, check_snapshot_folder, read_solver
from caffe_jacinto.quantization.settling import write_ranges

_MOST_UNCHECKED = 1000
"""Losses that may wait on the device before they are checked."""


def train(options: Options) -> int:
    """Train as ``options`` say, and return the exit code. Stopped by a signal it is 0, as Caffe's.

    From the last iteration's snapshot nothing more is trained; the stage is only completed again.

    Raises:
        UserError: a file that is missing, damaged or not supported; nothing was trained.
    """
    requests = StopRequests()
    solver = read_solver(options.solver, options.dialect)
    check_solver(solver)
    check_snapshot_folder(solver)
    tests = [(test.written, test.definition) for test in solver.tests]
    check_networks([(solver.written, solver.train_net), *tests])
    if options.quantize is not None:
        check_quantized(options, solver)
    gpus = options.gpus or ()
    device = device_of_rank(gpus, options)
    with ExitStack() as stack:
        ranks = Ranks(device)
        stack.callback(ranks.close)
        fits = partial(batch_that_fits, solver, device, options)
        log = stack.enter_context(open_log(ranks, gpus, options, fits))
        return Trainer(options, solver, device, ranks, requests, stack, log).train()


class Trainer(Stage):
    """A stage in training, on one rank."""

    def __init__(
        self,
        options: Options,
        solver: SolverFile,
        device: torch.device,
        ranks: Ranks,
        requests: StopRequests,
        stack: ExitStack,
        log: CaffeLog,
    ) -> None:
        """As `Stage`; ``requests`` are those to stop, and for snapshots."""
        super().__init__(options, solver, device, ranks, stack, log)
        self._requests, self._stopped = requests, False
        self._last_snapshot = self.iteration if options.snapshot else -1
        self._losses: deque[Tensor] = deque(maxlen=max(self.parameters.average_loss, 1))
        self._unchecked: list[tuple[int, Tensor]] = []
        self._displayed, self._display_time = self.iteration, time.monotonic()

    def train(self) -> int:
        """Train to the last iteration, or until a request to stop; returns the exit code.

        Raises:
            UserError: a record of the data cannot be used.
        """
        most = self.parameters.max_iter
        self.log.optimization_starts(self.net.name, self.parameters.lr_policy)
        if self.holds_zeros:
            self._display_sparsity()
        self.iterate.move_to(self.iterate.block)
        if self.quantized is not None and not self.quantized.ranges.chosen:
            self._calibrate(self.quantized)
        while self.iteration < most and not self._stopped:
            self._display_and_test()
            if not self._stopped:
                self._iterate()
        # Without an update Caffe takes one only if it has no interval, of which iteration 0 is a multiple.
        wanted = self.parameters.snapshot_after_train and (self.iteration or not self.parameters.snapshot)
        if wanted and self._last_snapshot != self.iteration:
            self._snapshot()
        self.log.optimization_ends(early=self._stopped or not self._finish())
        return 0

    def _calibrate(self, quantized: QuantizedTraining) -> None:
        """Choose the first ranges by passes over training batches, which the training then begins with."""
        assert self.options.quantize is not None
        place, batches = self.iterate.block, self.options.quantize.batches
        self.log.info(f"Calibrating the ranges of activations over {batches} batches")
        for _ in range(batches):  # of each rank; the first one's ranges are all ranks'
            (self._stopped,) = self.ranks.any(self._stop())
            if self._stopped:
                break
            quantized.calibrate(self.inputs.batch())
        else:
            quantized.choose()
        self.iterate.move_to(place)

    def _display_and_test(self) -> None:
        iteration, every = self.iteration, self._sparsity_interval()
        if every and iteration and iteration % every == 0:
            self._display_sparsity()
        interval = self.parameters.test_interval
        if interval and iteration % interval == 0 and (iteration or self.parameters.test_initialization):
            self._check_losses()
            self._test()

    def _sparsity_interval(self) -> int:
        if self.sparse:
            return self.sparse.display
        fork = self.solver.dialect is Dialect.CAFFE_JACINTO
        return int(self.parameters.display_sparsity) if fork else 0

    def _test(self) -> None:
        """A scheduled test, and one of the average of the weights if there is one."""
        done = self._test_weights()
        if done and self.average is not None and self.iteration:
            with self.average.in_place():
                done = self._test_weights(averaged=True)
        self._stopped |= not done

    def _test_weights(self, *, averaged: bool = False) -> bool:
        """Test what the net has, with recalibrated statistics if these are requested; training keeps its own.

        False: a request to stop came first.
        """
        batches = self.options.reestimate_batches if self.options.recalibrate_tests else 0
        if not batches or not self.statistics.layers or not self.tests:
            return self.tests.test(self.iteration, self._stop, averaged=averaged)
        place = self.iterate.block
        with self.statistics.kept():
            done = self.statistics.recalibrate(batches, self.iterate.forward, self._stop)
            done = done and self.tests.test(self.iteration, self._stop, batches, averaged=averaged)
        self.iterate.move_to(place)
        return done

    def _stop(self) -> bool:
        return self._requests.stop

    def _display_sparsity(self) -> None:
        self.log.sparsity(*self.pruner.counts(), inner_products=self.pruner.inner_products)

    def _iterate(self) -> None:
        iteration = self.iteration
        if self.quantized is not None and self.quantized.begin(iteration):
            self.statistics.share()
        displayed = self.parameters.display and iteration % self.parameters.display == 0
        net = self._net_of(iteration)
        debug = self.debug.get(net) if displayed else None
        result = self.iterate(iteration, self.solver.rate(iteration), debug)
        self._remember_loss(result.loss)
        if displayed:
            self._display(iteration, result)
        pruned = self.pruner.after_update(iteration)
        if pruned:
            self._check_zeros(iteration)
        self.iteration += 1
        if self.average is not None:
            self.average.update(self.iteration)
            if pruned:
                self.average.hold(self.pruner.held)
            if self.iteration == self.parameters.max_iter:
                self.average.end(self.pruner.layers if self.holds_zeros else ())
                self.average = None
        self._stopped, asked = self.ranks.any(self._requests.stop, self._requests.take_snapshot())
        due = self.parameters.snapshot and self.iteration % self.parameters.snapshot == 0
        if asked or due:
            self._snapshot()

    def _check_zeros(self, iteration: int) -> None:
        """Raise `FoundByAll` where the pruned weights of the ranks are no longer the same ones."""
        if self.ranks.size == 1:
            return
        if layers := self.ranks.different(self.pruner.checksums()):
            raise FoundByAll(
                f"Iteration {iteration}: the ranks have different zeros in layer {', '.join(layers)}; "
                "resume from the last snapshot"
            )

    def _net_of(self, iteration: int) -> Net:
        """The net that takes images of the size of ``iteration``, in which they are from now on."""
        size = self.solver.image_size(iteration)
        if size is None:
            return self.net
        if self.iterate.resize(self.nets[size], size):
            self.log.info(f"Training images are resized to {size}x{size} from here on")
        return self.nets[size]

    # The log

    def _remember_loss(self, loss: Tensor) -> None:
        """Remember this iteration's loss, which the device may still be computing."""
        self._losses.append(loss)
        self._unchecked.append((self.iteration, loss))
        if len(self._unchecked) >= _MOST_UNCHECKED:
            self._check_losses()

    def _check_losses(self) -> None:
        """Wait for the device, and fail if a loss is no longer a number, or a label was out of range.

        Raises:
            FoundByAll: a loss is not.
            UserError: a label is out of range.
        """
        if not self._unchecked:
            return
        for net in (self.net, *self.nets.values()):
            net.check_indices()
        values = self.ranks.total(torch.stack([loss for _, loss in self._unchecked]).tolist())
        bad = [at for (at, _), value in zip(self._unchecked, values, strict=True) if not math.isfinite(value)]
        self._unchecked.clear()
        if bad:
            raise FoundByAll(
                f"Iteration {bad[0]}: the loss is not a number; try a lower base_lr, or clip_gradients"
            )

    def _display(self, iteration: int, result: NetResult) -> None:
        self._check_losses()
        smoothed = torch.stack(list(self._losses)).mean()
        names = self.net.output_names
        parts = [smoothed.reshape(1), *(result.outputs[name].reshape(-1) for name in names)]
        values = self.ranks.total(torch.cat([part.double() for part in parts]).tolist())
        values = [value / self.ranks.size for value in values]
        now = time.monotonic()
        self.log.train_progress(iteration, now - self._display_time, iteration - self._displayed, values[0])
        self._displayed, self._display_time = iteration, now
        outputs = named(names, [part.numel() for part in parts[1:]], values[1:])
        self.log.outputs("Train", outputs, self.net.loss_weights)
        fork = self.solver.dialect is Dialect.CAFFE_JACINTO
        momentum = self.parameters.momentum if fork else None
        self.log.rate(iteration, self.solver.rate(iteration), momentum)

    # Snapshots and the end of the stage

    def _snapshot(self) -> None:
        """Masks first and the solver state last: where that is complete, so is the rest."""
        self._check_losses()
        self._last_snapshot = self.iteration
        self.statistics.share()
        if self.average is not None:
            with self.average.in_place():
                self.statistics.share()
        if not self.ranks.first:
            return
        weights, state = (self._file(ending) for ending in (".caffemodel", ".solverstate"))
        state.unlink(missing_ok=True)
        if self.holds_zeros:
            self.pruner.save(state)
        if self.average is not None:
            self.log.info(f"Writing the average of the weights to {average_file(state)}")
            self.average.save(state)
        self.log.writes_weights(weights)
        save_weights(self.net, weights, self.optimizer.updates)
        self.log.writes_state(state)
        write_state(
            state,
            iteration=self.iteration,
            current_step=self.solver.current_step(self.iteration),
            learned_net=weights,
            history=self.optimizer.history,
            place=Place(
                self.seed,
                self.iterate.block * self.batch,
                self.solver.dialect.value,
                self.solver_type,
                self.inputs.decode,
                self.precision,
            ),
            dialect=self.solver.dialect,
            ranges=None if self.quantized is None else self.quantized.ranges.state(),
        )

    def _file(self, ending: str) -> Path:
        return self.solver.snapshot(self.iteration, ending)

    def _finish(self) -> bool:
        """Caffe's last lines, then complete the stage; False if a request to stop came first."""
        if self.holds_zeros:
            self._display_sparsity()
        if self.quantized is not None:
            self.quantized.begin(self.iteration)  # what is tested is what the final snapshot holds
        display, interval = self.parameters.display, self.parameters.test_interval
        batches, place = self.options.reestimate_batches, self.iterate.block
        if display and self.iteration % display == 0:
            with torch.no_grad():
                # Caffe's net is watched as it was in the last iteration.
                result = self.iterate.forward(self.debug.get(self.net) if display == 1 else None)
            self._losses.append(result.loss.detach())
            (value,) = self.ranks.total([float(torch.stack(list(self._losses)).mean())])
            self.log.last_loss(self.iteration, value / self.ranks.size)
        if batches:
            # The place at which a training resumed from its last snapshot would be.
            self.iterate.move_to(place)
            return self._complete(batches)
        if self.quantized is not None:
            return self._complete_quantized(self.quantized)
        if interval and self.iteration % interval == 0:
            self._test()
        return not self._stopped

    def _complete_quantized(self, quantized: QuantizedTraining) -> bool:
        """Test the final weights, and write the ranges beside them. False: a request to stop came first."""
        if not self.tests.test(self.iteration, self._stop):
            return False
        if self.ranks.first:
            write_ranges(self._file(".caffemodel"), quantized.network, quantized.ranges)
        return True

    def _complete(self, batches: int) -> bool:
        """Recalibrate, put the statistics into the final weights, test these, and mark the stage complete.

        After a kill at any moment it can be repeated. False: a request to stop came first.
        """
        layers = self.statistics.layers
        self.log.recalibrates(layers, batches)
        if layers and not self.statistics.recalibrate(batches, self.iterate.forward, self._stop):
            return False
        final = self._file(".caffemodel")
        if self.ranks.first:
            self.log.writes_weights(final)
            save_weights(self.net, final, self.optimizer.updates)
        if not self.tests.test(self.iteration, self._stop, batches if layers else 0):
            return False
        if self.ranks.first:
            mark_complete(final, batches)
        return True
