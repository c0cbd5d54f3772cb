"""All that a stage trains with, on one rank: built from its files, and loaded with what it starts from."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import torch

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.caffe_log import CaffeLog
from caffe_jacinto.engines.pytorch import cpu_kernels
from caffe_jacinto.engines.pytorch.average import WeightAverage
from caffe_jacinto.engines.pytorch.batch_norm import Statistics
from caffe_jacinto.engines.pytorch.debug_info import DebugInfo
from caffe_jacinto.engines.pytorch.distributed import Ranks
from caffe_jacinto.engines.pytorch.engine import DecodeChoice, Options
from caffe_jacinto.engines.pytorch.evaluate import TestNets
from caffe_jacinto.engines.pytorch.feed import Inputs, share_batches
from caffe_jacinto.engines.pytorch.gpu_decode import can_decode
from caffe_jacinto.engines.pytorch.image_sizes import sized_nets
from caffe_jacinto.engines.pytorch.iteration import Iteration
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.engines.pytorch.precision import Precise, allow_tf32, fastest
from caffe_jacinto.engines.pytorch.pruner import TorchPruner
from caffe_jacinto.engines.pytorch.qat import QuantizedTraining
from caffe_jacinto.engines.pytorch.snapshot import (
    Place,
    load_weights,
    read_place,
    read_ranges_state,
    read_state,
)
from caffe_jacinto.engines.pytorch.solvers import solver_class
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.render import number
from caffe_jacinto.prototxt.solver import TEST, TRAIN, SolverFile
from caffe_jacinto.pruning.pruner import masks_file
from caffe_jacinto.quantization.schemes import chosen_scheme
from caffe_jacinto.recipes.model import QuantizeSettings


class Stage:
    """A stage that is ready to train, on one rank."""

    def __init__(
        self,
        options: Options,
        solver: SolverFile,
        device: torch.device,
        ranks: Ranks,
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
        # What is asked where the memory is too small: which batch fits.
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
        self.nets = sized_nets(solver, self.net)
        """By the sizes that training images are resized to."""

        for net in self.nets.values():
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
        watched = (self.net, *self.nets.values()) if wanted else ()
        self.debug = {net: DebugInfo(net, log) for net in watched}
        log.info("Solver scaffolding done.")
        self._begin()
        self.average = self._choose_average()

    @property
    def solver_type(self) -> str:
        """Its name in Caffe."""
        return solver_class(self.parameters, str(self.solver.path)).__name__

    @property
    def batch(self) -> int:
        """Images of a pass; a pass counts as one where no layer reads images."""
        return self.inputs.batch_size or 1

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
            if place.solver not in (None, self.solver_type):
                raise UserError(
                    f"{self.options.snapshot}: its history is that of solver type {place.solver}, and"
                    f" {self.solver.path} names {self.solver_type}, to which it means something else;"
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

    def _resume(self, snapshot: Path) -> None:
        self.log.resumes_from(snapshot)
        self.iteration, weights, place = read_state(snapshot, self.optimizer.history)
        missing, _ = load_weights(self.net, weights)
        if missing:
            raise UserError(f"{weights}: lacks layer {missing[0]} of {self.net.where}; use another snapshot")
        if place is None:
            self.iterate.block = self.iteration * self.parameters.iter_size * self.ranks.size
        else:
            self.iterate.block = place.images // self.batch
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
