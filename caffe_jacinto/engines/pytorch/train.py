"""``caffe train`` on PyTorch: one rank's part of it.

Each iteration is Caffe's: test where it is due, passes forward and backward, one update, a snapshot where it
is due. What is random, and the place in the data, follow from the seed and the images seen, which snapshots
hold: a training that goes on from one is the training that never stopped.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caffe_jacinto.common.errors import RunFailed, UserError
from caffe_jacinto.common.processes import StopRequests
from caffe_jacinto.data.batches import random_numbers
from caffe_jacinto.engines import caffe_log
from caffe_jacinto.engines.pytorch import log
from caffe_jacinto.engines.pytorch.distributed import Ranks, device_of_rank
from caffe_jacinto.engines.pytorch.evaluate import Precision, TestNets, autocast, named
from caffe_jacinto.engines.pytorch.feed import Inputs, share_batches
from caffe_jacinto.engines.pytorch.layer_setup import TEST, TRAIN
from caffe_jacinto.engines.pytorch.net import Net, NetResult
from caffe_jacinto.engines.pytorch.pruner import Zeros
from caffe_jacinto.engines.pytorch.recalibrate import reestimate
from caffe_jacinto.engines.pytorch.snapshot import (
    Place,
    load_weights,
    read_place,
    read_state,
    save_weights,
    write_state,
)
from caffe_jacinto.engines.pytorch.solver_file import SolverFile, is_frozen, read_solver
from caffe_jacinto.engines.pytorch.solvers import Updater
from caffe_jacinto.engines.snapshots import record_handover
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.pruning.masks import load_masks, masks_file, save_masks
from caffe_jacinto.pruning.rule import is_step
from caffe_jacinto.recipes.model import SparseSettings

_MOST_UNSEEN = 1000
"""Losses that may wait on the device until they are looked at."""


@dataclass(frozen=True)
class TrainOptions:
    """What ``train`` is told."""

    solver: Path
    dialect: Dialect = Dialect.BVLC
    weights: tuple[Path, ...] = ()
    """Start from these weights, the later ones over the earlier."""

    snapshot: Path | None = None
    """Go on from this ``.solverstate``."""

    gpus: tuple[int, ...] = ()
    """Empty: the CPU."""

    precision: Precision = "fp32"
    shuffle: bool = False
    """Another order of the images in each epoch, also where the prototxt does not say so."""

    workers: int | None = None
    """Processes that decode images, of each rank; None: as many as suit the machine."""

    sparse: SparseSettings | None = None
    """Sparsify, where the solver file's dialect has no fields for it."""

    freeze_zeros: bool = False
    """Hold the convolutions' zeros of ``weights`` at zero."""

    reestimate_batches: int = 0
    """Training batches to estimate batch-norm statistics over at the end; 0: leave the running averages."""


def train(options: TrainOptions) -> int:
    """Train as ``options`` say, and return the exit code. Stopped by a signal it is 0, as Caffe's.

    Going on from the last iteration's snapshot, nothing is trained, and the end is done again.

    Raises:
        UserError: a file that is missing, damaged or not supported; nothing was trained.
    """
    requests = StopRequests()
    solver = read_solver(options.solver, options.dialect)
    device = device_of_rank(options.gpus)
    with ExitStack() as stack:
        ranks = Ranks(device)
        stack.callback(ranks.close)
        stack.enter_context(log.opened(ranks, options.gpus, options.dialect, options.precision))
        return Trainer(options, solver, device, ranks, requests, stack).train()


class Trainer:
    """A stage in training, on one rank."""

    def __init__(
        self,
        options: TrainOptions,
        solver: SolverFile,
        device: torch.device,
        ranks: Ranks,
        requests: StopRequests,
        stack: ExitStack,
    ) -> None:
        """Read everything and build everything; ``stack`` ends the processes that decode.

        Raises:
            UserError: a file that is missing, damaged or not supported.
        """
        self.options, self.solver, self.ranks, self.requests = options, solver, ranks, requests
        self.parameters = solver.parameters
        self.sparse = solver.sparse or options.sparse
        self.freezes = bool(self.sparse or solver.freezes_zeros or options.freeze_zeros)
        self.iteration = 0
        """Updates done so far."""

        self._block = 0
        """The batches that all ranks together have seen."""

        self._stopped = False
        self._share_batches()
        log.solver(self.parameters)
        self.seed = self._choose_seed()
        self.inputs = stack.enter_context(self._inputs(TRAIN, solver.train_net, solver.train_file, device))
        test_inputs = [
            stack.enter_context(self._inputs(TEST, test.definition, test.file, device))
            for test in solver.tests
        ]
        caffe_log.info(f"Creating training net from train_net file: {solver.train_file}")
        self.net = Net(
            solver.train_net,
            TRAIN,
            solver.dialect,
            where=str(solver.train_file),
            seed=self.seed,
            device=device,
            data_shapes=self.inputs.shapes,
        )
        self.inputs.fit(self.net)
        log.net(solver.train_net, self.net)
        learnables = self.net.learnables
        self.updater = Updater(self.parameters, learnables, str(solver.path))
        places = {id(learnable.tensor): i for i, learnable in enumerate(learnables)}
        layers = self.net.convolutions()
        history = [[moment[places[id(layer.weights)]] for moment in self.updater.history] for layer in layers]
        self.zeros = Zeros(layers, history, self.sparse.start_factor if self.sparse else 0.0)
        self.frozen_layers = {layer.name for layer in self.net.layers if is_frozen(layer)}
        self.tests = TestNets(solver, self.net, test_inputs, ranks, options.precision)
        caffe_log.info("Solver scaffolding done.")
        self._begin()
        self._losses: deque[Tensor] = deque(maxlen=max(self.parameters.average_loss, 1))
        self._unseen: list[tuple[int, Tensor]] = []
        self._displayed, self._display_time = self.iteration, time.monotonic()

    # What the training starts from

    def _share_batches(self) -> None:
        if self.solver.dialect is not Dialect.CAFFE_JACINTO or self.ranks.size == 1:
            return
        for note in share_batches(self.solver.train_net, TRAIN, self.ranks.size):
            if self.ranks.first:
                log.warn(note)

    def _choose_seed(self) -> int:
        """Of all that is random: the snapshot's, the solver's, or another each time."""
        place = read_place(self.options.snapshot) if self.options.snapshot else None
        if place is not None:
            if place.dialect not in (None, self.solver.dialect.value):
                raise UserError(
                    f"{self.options.snapshot}: it was trained with -dialect {place.dialect}, not"
                    f" {self.solver.dialect.value}: the same blobs mean something else; give that dialect"
                )
            return place.seed
        given = self.parameters.random_seed
        return self.ranks.agree(given if given >= 0 else secrets.randbits(31))

    def _inputs(self, phase: int, definition: Any, file: Path, device: torch.device) -> Inputs:
        options = self.options
        return Inputs(
            definition,
            phase,
            str(file),
            device=device,
            seed=self.seed,
            workers=options.workers,
            shuffle=options.shuffle and phase == TRAIN,
        )

    def _begin(self) -> None:
        """Load what the stage starts from; its zeros hold from here on."""
        weights = self.options.weights or tuple(Path(path) for path in self._solver_weights())
        if self.options.snapshot:
            self._resume(self.options.snapshot)
        else:
            for path in weights:
                self._load(path)
            if weights and self.freezes:
                self.zeros.freeze()
        # They are the same already, but for what another processor's arithmetic makes of the fillers.
        self.ranks.copy_from_first([blob.tensor for _, _, blob in self.net.blobs])
        self._last_snapshot = self.iteration if self.options.snapshot else -1

    def _solver_weights(self) -> Iterator[str]:
        for entry in getattr(self.parameters, "weights", ()):  # the fork's schema has no such field
            yield from (path.strip() for path in entry.split(","))

    def _load(self, path: Path) -> None:
        caffe_log.info(f"Finetuning from {path}")
        missing, unused = load_weights(self.net, path)
        for name in unused:
            caffe_log.info(f"Ignoring source layer {name}")
        for name in missing:
            caffe_log.info(f"Layer {name} is not in {path}: it starts as its fillers say")

    def _resume(self, snapshot: Path) -> None:
        caffe_log.info(f"Resuming from {snapshot}")
        history = [tensor for moment in self.updater.history for tensor in moment]
        self.iteration, weights, place = read_state(snapshot, history)
        missing, _ = load_weights(self.net, weights)
        if missing:
            raise UserError(f"{weights}: lacks layer {missing[0]} of {self.net.where}; take another snapshot")
        if place is None:
            self._block = self.iteration * self.parameters.iter_size * self.ranks.size
        else:
            self._block = place.images // self.inputs.batch_size
        if not self.freezes:
            return
        if self.solver.freezes_zeros and not masks_file(snapshot).exists():
            # The fork's own snapshot: the solver file says how far the ramp is.
            self.zeros.freeze()
            return
        masks, self.zeros.factor = load_masks(snapshot, self.zeros.weights())
        self.zeros.take_masks(masks)
        if self.sparse:
            caffe_log.info(f"The ramp goes on from {caffe_log.number(self.zeros.factor)}")

    # The training

    def train(self) -> int:
        """Train to the last iteration, or until a request to stop; returns the exit code.

        Raises:
            UserError: a record of the data cannot be used.
        """
        most = self.parameters.max_iter
        caffe_log.info("Starting Optimization")
        caffe_log.info(f"Solving {self.net.name}")
        caffe_log.info(f"Learning Rate Policy: {self.parameters.lr_policy}")
        if self.freezes:
            self.zeros.display()
        self._go_to_place()
        while self.iteration < most and not self._stopped:
            self._display_and_test()
            if not self._stopped:
                self._iterate()
        if self.parameters.snapshot_after_train and self._last_snapshot != self.iteration:
            self._snapshot()
        if self._stopped or not self._finish():
            caffe_log.info("Optimization stopped early.")
        caffe_log.info("Optimization Done.")
        return 0

    def _go_to_place(self) -> None:
        self.inputs.start_at(self._block + self.ranks.rank, self.ranks.size)

    def _display_and_test(self) -> None:
        iteration, every = self.iteration, self._sparsity_interval()
        if every and iteration and iteration % every == 0:
            self.zeros.display()
        interval = self.parameters.test_interval
        if interval and iteration % interval == 0 and (iteration or self.parameters.test_initialization):
            self._look_at_losses()
            self._test()

    def _sparsity_interval(self) -> int:
        if self.sparse:
            return self.sparse.display
        fork = self.solver.dialect is Dialect.CAFFE_JACINTO
        return int(self.parameters.display_sparsity) if fork else 0

    def _test(self) -> None:
        self._stopped |= not self.tests.test(self.iteration, lambda: self.requests.stop)

    def _iterate(self) -> None:
        iteration, passes = self.iteration, self.parameters.iter_size
        loss, result = None, None
        for _ in range(passes):
            result = self._pass()
            if result.loss.requires_grad:
                result.loss.backward()
            part = result.loss.detach()
            loss = part if loss is None else loss + part
        assert loss is not None and result is not None
        self._note(loss / passes)
        if self.parameters.display and iteration % self.parameters.display == 0:
            self._display(iteration, result)
        self.ranks.average(self.updater.gradients())
        self.zeros.hold_gradients()
        self.updater.apply(iteration, self.solver.rate(iteration), passes)
        if self.sparse and is_step(self.sparse, iteration):
            self.zeros.take_threshold(self.sparse, self.frozen_layers)
        self.iteration += 1
        self._stopped, asked = self.ranks.any(self.requests.stop, self.requests.take_snapshot())
        due = self.parameters.snapshot and self.iteration % self.parameters.snapshot == 0
        if asked or due:
            self._snapshot()

    def _pass(self) -> NetResult:
        """One pass forward over this rank's next batch."""
        # Dropout and random data of a pass follow from its place alone.
        draws = random_numbers(self.seed, self._block + self.ranks.rank, "dropout")
        self.net.reseed(int(draws.integers(1 << 62)))
        with autocast(self.net.device, self.options.precision):
            result = self.net(self.inputs.batch())
        self._block += self.ranks.size
        return result

    # What is seen of it

    def _note(self, loss: Tensor) -> None:
        """Remember this iteration's loss, which the device may still be computing."""
        self._losses.append(loss)
        self._unseen.append((self.iteration, loss))
        if len(self._unseen) >= _MOST_UNSEEN:
            self._look_at_losses()

    def _look_at_losses(self) -> None:
        """End a training whose loss is no longer a number; waits for the device."""
        if not self._unseen:
            return
        values = self.ranks.total(torch.stack([loss for _, loss in self._unseen]).tolist())
        bad = [at for (at, _), value in zip(self._unseen, values, strict=True) if not math.isfinite(value)]
        self._unseen.clear()
        if bad:
            raise RunFailed(
                f"Iteration {bad[0]}: the loss is not a number; try a lower base_lr, or clip_gradients"
            )

    def _display(self, iteration: int, result: NetResult) -> None:
        self._look_at_losses()
        smoothed = torch.stack(list(self._losses)).mean()
        names = self.net.output_names
        parts = [smoothed.reshape(1), *(result.outputs[name].reshape(-1) for name in names)]
        values = self.ranks.total(torch.cat([part.double() for part in parts]).tolist())
        values = [value / self.ranks.size for value in values]
        now = time.monotonic()
        caffe_log.train_progress(iteration, now - self._display_time, iteration - self._displayed, values[0])
        self._displayed, self._display_time = iteration, now
        log.outputs(
            "Train", named(names, [part.numel() for part in parts[1:]], values[1:]), self.net.loss_weights
        )
        momentum = ""
        if self.solver.dialect is Dialect.CAFFE_JACINTO:
            momentum = f", m = {caffe_log.number(self.parameters.momentum)}"
        caffe_log.info(
            f"Iteration {iteration}, lr = {caffe_log.number(self.solver.rate(iteration))}{momentum}"
        )

    # What is left of it

    def _snapshot(self) -> None:
        """Masks first and the solver state last: where that is whole, so is all the rest."""
        self._look_at_losses()
        self._last_snapshot = self.iteration
        if not self.ranks.first:
            return
        weights, state = (self._file(ending) for ending in (".caffemodel", ".solverstate"))
        state.unlink(missing_ok=True)
        if self.freezes:
            save_masks(state, self.zeros.masks(), self.zeros.factor)
        caffe_log.info(f"Snapshotting to binary proto file {weights}")
        save_weights(self.net, weights)
        caffe_log.info(f"Snapshotting solver state to binary proto file {state}")
        write_state(
            state,
            iteration=self.iteration,
            current_step=self.solver.current_step(self.iteration),
            learned_net=weights,
            history=[tensor for moment in self.updater.history for tensor in moment],
            place=Place(self.seed, self._block * self.inputs.batch_size, self.solver.dialect.value),
            dialect=self.solver.dialect,
        )

    def _file(self, ending: str) -> Path:
        return self.solver.snapshot(self.iteration, ending)

    def _finish(self) -> bool:
        """What Caffe does at the end, and the hand-over; False if a request to stop came first."""
        if self.freezes:
            self.zeros.display()
        display, interval = self.parameters.display, self.parameters.test_interval
        batches, place = self.options.reestimate_batches, self._block
        if display and self.iteration % display == 0:
            with torch.no_grad():
                loss = self._pass().loss
            (value,) = self.ranks.total([float(loss)])
            caffe_log.info(f"Iteration {self.iteration}, loss = {caffe_log.number(value / self.ranks.size)}")
        if batches:
            # As it would be, were the training to go on from its last snapshot.
            self._block = place
            self._go_to_place()
            return self._hand_over(batches)
        if interval and self.iteration % interval == 0:
            self._test()
        return not self._stopped

    def _hand_over(self, batches: int) -> bool:
        """Estimate the statistics, put them into the final weights, test these, and record that.

        Killed at any moment, it can be done again.
        """
        stop = lambda: self.requests.stop  # noqa: E731
        if not reestimate(self.net, batches, self._pass, self.ranks, stop):
            return False
        final = self._file(".caffemodel")
        if self.ranks.first:
            caffe_log.info(f"Snapshotting to binary proto file {final}")
            save_weights(self.net, final)
        if not self.tests.test(self.iteration, stop):
            return False
        if self.ranks.first:
            record_handover(final, batches)
        return True
