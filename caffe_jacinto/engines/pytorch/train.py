"""``caffe train`` on PyTorch: one rank's part of it.

Each iteration is Caffe's: a test where one is due, passes forward and backward, one update, a snapshot where
one is due. Everything random and the place in the data follow from the seed and the number of images seen,
which snapshots hold: a resumed training gives the weights of one that never stopped.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.processes import StopRequests
from caffe_jacinto.engines.caffe_log import CaffeLog
from caffe_jacinto.engines.contract import ImageShape, stage_solver
from caffe_jacinto.engines.pytorch import cpu_kernels
from caffe_jacinto.engines.pytorch.average import WeightAverage, average_file
from caffe_jacinto.engines.pytorch.batch_norm import Statistics
from caffe_jacinto.engines.pytorch.debug_info import DebugInfo
from caffe_jacinto.engines.pytorch.distributed import FoundByAll, Ranks, device_of_rank, open_log
from caffe_jacinto.engines.pytorch.engine import DecodeChoice, Options
from caffe_jacinto.engines.pytorch.evaluate import TestNets, named
from caffe_jacinto.engines.pytorch.feed import Inputs, expected_shapes, share_batches
from caffe_jacinto.engines.pytorch.gpu_decode import can_decode
from caffe_jacinto.engines.pytorch.image_sizes import sized_nets
from caffe_jacinto.engines.pytorch.iteration import Iteration
from caffe_jacinto.engines.pytorch.net import Net, NetResult
from caffe_jacinto.engines.pytorch.network_check import check_networks
from caffe_jacinto.engines.pytorch.precision import Precise, allow_tf32, fastest
from caffe_jacinto.engines.pytorch.pruner import TorchPruner
from caffe_jacinto.engines.pytorch.qat import QuantizedTraining
from caffe_jacinto.engines.pytorch.snapshot import (
    Place,
    load_weights,
    read_place,
    read_ranges_state,
    read_state,
    save_weights,
    write_state,
)
from caffe_jacinto.engines.pytorch.solver_fields import check_solver
from caffe_jacinto.engines.pytorch.solvers import solver_class
from caffe_jacinto.engines.snapshots import mark_complete
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.render import number
from caffe_jacinto.prototxt.solver import TEST, TRAIN, SolverFile, check_snapshot_folder, read_solver
from caffe_jacinto.pruning.pruner import masks_file
from caffe_jacinto.quantization.fork_settings import tested_network
from caffe_jacinto.quantization.schemes import chosen_scheme
from caffe_jacinto.quantization.settling import write_ranges
from caffe_jacinto.recipes.model import QuantizeSettings

T = TypeVar("T")

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
        fits = partial(_batch_that_fits, solver, device, options)
        log = stack.enter_context(open_log(ranks, gpus, options, fits))
        return Trainer(options, solver, device, ranks, requests, stack, log).train()


def _batch_that_fits(solver: SolverFile, device: torch.device, options: Options) -> int | None:
    from caffe_jacinto.engines.pytorch.memory import largest_batch

    # Still "auto": the memory was too small to choose in; then bf16 is what is taken where it is just enough.
    precision = "bf16" if options.precision == "auto" else options.precision
    with Inputs(
        solver.train_net, TRAIN, str(solver.train_file), device=torch.device("cpu"), seed=0, workers=1
    ) as inputs:
        return largest_batch(solver, inputs.shapes, device, precision)


class Trainer:
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
        """Read everything and build everything; ``stack`` ends the processes that decode.

        Raises:
            UserError: a file that is missing, damaged or not supported.
        """
        self.options, self.solver, self.ranks, self.log = options, solver, ranks, log
        self.parameters = solver.parameters
        self.iteration = 0
        """Updates done so far."""

        self._requests, self._stopped = requests, False
        self._share_batches()
        log.solver(self.parameters)
        place = read_place(options.snapshot) if options.snapshot else None
        self.seed = self._choose_seed(place)
        self._decode = self._choose_decode(place, device)
        self.inputs = stack.enter_context(self._inputs(TRAIN, solver.train_net, solver.train_file, device))
        test_inputs = [
            stack.enter_context(self._inputs(TEST, test.definition, test.file, device))
            for test in solver.tests
        ]
        for fed in (self.inputs, *test_inputs):
            for note in fed.notes:
                log.info(note)
        quantize = options.quantize
        self.precision = options.precision = self._choose_precision(place, device)
        inside = solver.train_file == solver.path
        log.info(
            "Creating training net "
            + (f"specified in {solver.train_source}." if inside else f"from {solver.train_source}")
        )
        self.net = Net(
            solver.train_net,
            TRAIN,
            solver.dialect,
            where=str(solver.train_file),
            seed=self.seed,
            device=device,
            data_shapes=self.inputs.shapes,
            fused=quantize is None,
        )
        self.inputs.fit(self.net)
        self.net.write_to(log)
        if device.type == "cpu" and (why := cpu_kernels.why_not()):
            log.info(f"Batch norm, ReLU and pooling run one after the other, which is slower: {why}")
        self.optimizer = solver_class(self.parameters, str(solver.path))(
            self.net.learnables,
            self.parameters,
            dialect=solver.dialect,
            capturable=device.type == "cuda",
        )
        self.statistics = Statistics(self.net, ranks, options.bn_stats)
        self.sparse = solver.pruning() or options.sparse
        self.holds_zeros = bool(self.sparse or solver.holds_zeros or options.freeze_zeros)
        self.pruner = TorchPruner(
            self.net,
            log.info,
            sparse=self.sparse,
            max_iter=self.parameters.max_iter,
            inner_products=options.sparsity_inner_products,
            unchanged=solver.frozen_layers(),
            history={id(blob): state["history"] for blob, state in self.optimizer.state.items()},
        )
        self._nets = sized_nets(solver, self.net)
        """By the sizes that training images are resized to."""

        for net in self._nets.values():
            self.inputs.fit(net)
        self.quantized = None if quantize is None else self._quantized(quantize)
        self.iterate = Iteration(
            self.quantized or self.net,
            self.inputs,
            self.optimizer,
            self.pruner,
            ranks,
            seed=self.seed,
            passes=self.parameters.iter_size,
            precision=self.precision,
            graph=options.graph,
        )
        self.tests = TestNets(
            solver,
            self.net,
            test_inputs,
            self.statistics,
            ranks,
            self.precision,
            log,
            self.quantized,
        )
        wanted = self.parameters.debug_info and ranks.first
        watched = (self.net, *self._nets.values()) if wanted else ()
        self._debug = {net: DebugInfo(net, log) for net in watched}
        log.info("Solver scaffolding done.")
        self._begin()
        self.average = self._choose_average()
        self._losses: deque[Tensor] = deque(maxlen=max(self.parameters.average_loss, 1))
        self._unchecked: list[tuple[int, Tensor]] = []
        self._displayed, self._display_time = self.iteration, time.monotonic()

    def _quantized(self, settings: QuantizeSettings) -> QuantizedTraining:
        """The net in quantized values."""
        most = int(self.parameters.max_iter)
        settle, freeze = settings.settle_iter, settings.freeze_bn_iter
        scheme = chosen_scheme(settings.model_dump())
        made = QuantizedTraining(
            self.net,
            scheme,
            self.ranks,
            bits=settings.bits_of,
            floats=settings.keep_float,
            settle=most // 4 if settle is None else min(settle, most),
            freeze=most // 2 if freeze is None else min(freeze, most),
        )
        self.log.trains_quantized(
            scheme.name, scheme.bits.weights, scheme.bits.activations, made.settle_from, made.freeze_from
        )
        return made

    # What the training starts from

    def _share_batches(self) -> None:
        if self.solver.dialect is not Dialect.CAFFE_JACINTO or self.ranks.size == 1:
            return
        for note in share_batches(self.solver.train_net, TRAIN, self.ranks.size):
            if self.ranks.first:
                self.log.warning(note)

    def _choose_seed(self, place: Place | None) -> int:
        """The seed of everything random: the snapshot's, the solver's, or another each time."""
        if place is not None:
            if place.dialect not in (None, self.solver.dialect.value):
                raise UserError(
                    f"{self.options.snapshot}: it was trained with -dialect {place.dialect}, not"
                    f" {self.solver.dialect.value}: the same blobs mean something else; give that dialect"
                )
            if place.solver not in (None, self._solver_type()):
                raise UserError(
                    f"{self.options.snapshot}: its history is that of solver type {place.solver}, and"
                    f" {self.solver.path} names {self._solver_type()}, to which it means something else;"
                    " name that type, or start from the weights alone with -weights"
                )
            return place.seed
        given = self.parameters.random_seed
        return self.ranks.agree(given if given >= 0 else secrets.randbits(31))

    def _choose_decode(self, place: Place | None, device: torch.device) -> DecodeChoice:
        """Where images are decoded: as requested; with "auto" as the snapshot says, if that is possible."""
        if self.options.decode != "auto":
            return self.options.decode
        if self.options.deterministic:
            return "cpu"
        before = place.decode if place is not None else None
        if before in ("gpu", "both") and (why := can_decode(device)):
            self.log.info(f"Images are decoded on the CPU from here on, and before on the GPU: {why}")
            return "cpu"
        return before or "auto"

    def _choose_precision(self, place: Place | None, device: torch.device) -> Precise:
        """The requested precision; where that is "auto", the snapshot's, or the one that measures fastest."""
        if self.options.quantize is not None:
            return "fp32"
        if self.options.precision != "auto":
            return self.options.precision
        chosen = place.precision if place is not None else None
        if chosen is None and self.options.deterministic:
            chosen = "fp32"
        elif chosen is None:
            found, line = fastest(self.solver, self.inputs.shapes, device)
            names = get_args(Precise)
            chosen = names[self.ranks.agree(names.index(found))]
            self.log.info(line)
        allow_tf32(chosen)
        return chosen

    def _solver_type(self) -> str:
        return solver_class(self.parameters, str(self.solver.path)).__name__

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
            decode=self._decode if phase == TRAIN else "cpu",
            agree=self.ranks.agree,
        )

    def _begin(self) -> None:
        """Load the weights that the stage starts from. Their zeros are held from here on."""
        weights = self.options.weights or tuple(Path(path) for path in self._solver_weights())
        if self.options.snapshot:
            self._resume(self.options.snapshot)
        else:
            for path in weights:
                self._load(path)
            if self.quantized is not None:
                self.quantized.check_statistics(weights[-1])
            if weights and self.holds_zeros:
                self.pruner.freeze_zeros()
        # They are the same already, unless another processor's arithmetic filled them differently.
        self.ranks.copy_from_first([blob.tensor for _, _, blob in self.net.blobs])
        self._last_snapshot = self.iteration if self.options.snapshot else -1

    def _choose_average(self) -> WeightAverage | None:
        """The average of the weights that the solver asks for, as the snapshot has it.

        None: there is none, or the weights are the average already, after the last iteration.
        """
        # What the file says, which float32 holds only nearly.
        decay = float(number(self.parameters.ema_decay))
        if not decay or self.iteration >= self.parameters.max_iter:
            return None
        average = WeightAverage(self.net, decay)
        if self.options.snapshot:
            average.load(self.options.snapshot)
        return average

    def _solver_weights(self) -> Iterator[str]:
        for entry in getattr(self.parameters, "weights", ()):  # the fork's schema has no such field
            yield from (path.strip() for path in entry.split(","))

    def _load(self, path: Path) -> None:
        self.log.starts_from(path)
        missing, unused = load_weights(self.net, path)
        for name in unused:
            self.log.info(f"Ignoring source layer {name}")
        for name in missing:
            self.log.info(f"Layer {name} is not in {path}: it starts as its fillers say")

    @property
    def _batch(self) -> int:
        """Images of a pass; a pass counts as one where no layer reads images."""
        return self.inputs.batch_size or 1

    def _resume(self, snapshot: Path) -> None:
        self.log.resumes_from(snapshot)
        self.iteration, weights, place = read_state(snapshot, self.optimizer.history)
        missing, _ = load_weights(self.net, weights)
        if missing:
            raise UserError(f"{weights}: lacks layer {missing[0]} of {self.net.where}; use another snapshot")
        if place is None:
            self.iterate.block = self.iteration * self.parameters.iter_size * self.ranks.size
        else:
            self.iterate.block = place.images // self._batch
        if self.quantized is not None:
            state = read_ranges_state(snapshot)
            if state is None:
                raise UserError(
                    f"{snapshot}: it has no ranges: it was not trained with -quantize; start from its "
                    "weights alone, with -weights"
                )
            self.quantized.resume(state, self.iteration, str(snapshot))
        if not self.holds_zeros:
            return
        if self.solver.holds_zeros and not masks_file(snapshot).exists():
            # The fork's own snapshot: the solver file has the schedule's factor.
            self.pruner.freeze_zeros()
        else:
            self.pruner.load(snapshot)

    # The training

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
        for _ in range(-(-batches // self.ranks.size)):
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
        debug = self._debug.get(net) if displayed else None
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
        if self.iterate.resize(self._nets[size], size):
            self.log.info(f"Training images are resized to {size}x{size} from here on")
        return self._nets[size]

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
        for net in (self.net, *self._nets.values()):
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
                self.iterate.block * self._batch,
                self.solver.dialect.value,
                self._solver_type(),
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
                result = self.iterate.forward(self._debug.get(self.net) if display == 1 else None)
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


def check_quantized(options: Options, solver: SolverFile) -> None:
    """Refuse what does not go with quantization-aware training.

    Raises:
        UserError: says what.
    """
    if options.dialect is not Dialect.BVLC:
        raise UserError(
            f"-quantize: prototxts of the dialect {Dialect.BVLC.value} are needed, and these are of "
            f"{options.dialect.value}"
        )
    if options.precision not in ("fp32", "auto"):
        raise UserError(
            f"-precision {options.precision}: with -quantize everything is computed in fp32, in which sums "
            "of whole numbers are exact; leave it out"
        )
    if options.reestimate_batches:
        raise UserError(
            "-reestimate_batches: with -quantize the running statistics of batch norms are folded into the "
            "weights as they are; leave it out"
        )
    if options.sparse is not None:
        raise UserError("-sparsity_target: prune before a training with -quantize, and hold its zeros")
    if solver.parameters.debug_info:
        raise UserError(
            f"{solver.path}: debug_info: with -quantize, layers are not computed one by one; leave it out"
        )
    if solver.parameters.ema_decay:
        raise UserError(
            f"{solver.path}: ema_decay: with -quantize, the ranges would be of other weights than their "
            "average; leave it out"
        )
    if solver.parameters.image_size:
        raise UserError(
            f"{solver.path}: image_size: with -quantize, the ranges would be of images of other sizes than "
            "in tests; leave it out"
        )
    if not options.weights and options.snapshot is None:
        raise UserError("-quantize: trained weights are needed to start from; give them with -weights")


def check_stages(
    stages: Mapping[str, Mapping[str, str]], images: Mapping[str, ImageShape], dialect: Dialect
) -> list[str]:
    """What training would refuse in stages whose prototxts these are: one line for each problem.

    ``images`` has the channels, height and width of the images in each LMDB that could be read.
    """
    problems: list[str] = []

    def attempt(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except UserError as error:
            if str(error) not in problems:
                problems.append(str(error))
            return None

    def built(definition: Any, file: Path, phase: int) -> Net | None:
        """The network; None where the size of its images is not known."""
        where, settings = str(file), None
        if phase == TEST:
            definition, settings = tested_network(definition, dialect, where)
        shapes = expected_shapes(definition, phase, where, images)
        if shapes is None:
            return None
        net = Net(definition, phase, dialect, where=where, seed=0, data_shapes=shapes, filled=False)
        if settings is not None:
            settings.network(net.layers, {}, where)
        return net

    for files in stages.values():
        solver = attempt(partial(stage_solver, files, dialect))
        if solver is None:
            continue
        attempt(partial(check_solver, solver))
        net = attempt(partial(built, solver.train_net, solver.train_file, TRAIN))
        if net is not None:
            attempt(partial(sized_nets, solver, net, filled=False))
        for test in solver.tests:
            tested = attempt(partial(built, test.definition, test.file, TEST))
            if net is not None and tested is not None:
                attempt(partial(tested.share_with, net))
    return problems
