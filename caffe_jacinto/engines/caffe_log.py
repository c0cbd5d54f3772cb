"""Caffe's log lines, for the training loops that are written here.

The wording is Caffe's, or the fork's where stock Caffe has no such line, so that one reader serves all logs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from caffe_jacinto.caffemodel.hdf5 import SUFFIX

CAFFE_SOURCE = "caffe.cpp:0"
"""The file that Caffe's own command line logs from: readers of logs know it by that."""


def number(value: float) -> str:
    """A float as C++ streams print it: six digits, no trailing zeros."""
    return f"{value:g}"


def write_line(severity: str, message: str, source: str) -> None:
    """A line on stderr in the form of Caffe's logger, glog; ``severity`` is I, W, E or F."""
    line = (
        f"{severity}{datetime.now():%Y%m%d %H:%M:%S.%f} {threading.get_native_id():5d} {source}] {message}\n"
    )
    os.write(2, line.encode(errors="replace"))


class CaffeLog:
    """Writes what a training reports as lines of Caffe's log."""

    def __init__(self, write: Callable[[str], None], source: str = "solver.py:0") -> None:
        """``write`` writes an I line; ``source`` is the file and line that the other lines name."""
        self.info = write
        self._source = source

    def warning(self, message: str) -> None:
        """A W line."""
        write_line("W", message, self._source)

    def fatal(self, message: str) -> None:
        """An F line; ending the program is the caller's part."""
        write_line("F", message, self._source)

    def starts_from(self, weights: Path) -> None:
        """Weights that a training starts from."""
        self.info(f"Finetuning from {weights}")

    def resumes_from(self, snapshot: Path) -> None:
        """The solver state that a training resumes from."""
        self.info(f"Resuming from {snapshot}")

    def optimization_starts(self, net: object, lr_policy: str) -> None:
        """``net`` names the network: its name, or its file."""
        self.info("Starting Optimization")
        self.info(f"Solving {net}")
        self.info(f"Learning Rate Policy: {lr_policy}")

    def optimization_ends(self, *, early: bool) -> None:
        """``early``: before the last iteration, or before the stage was marked complete."""
        if early:
            self.info("Optimization stopped early.")
        self.info("Optimization Done.")

    def using_devices(self, gpus: Sequence[int]) -> None:
        """Where the solver runs."""
        self.info(f"Using GPUs {', '.join(map(str, gpus))}" if gpus else "Use CPU.")

    def solver(self, parameters: Any) -> None:
        """The settings of a SolverParameter message."""
        self.info(f"Initializing solver from parameters: \n{_text(parameters)}")

    def net(
        self,
        definition: Any,
        data_shapes: Sequence[Sequence[int]],
        outputs: Sequence[str],
        more: str = "",
    ) -> None:
        """A NetParameter message, the shapes of its data layers' images, and its outputs.

        ``more``: lines of fields that come first.
        """
        self.info(f"Initializing net from parameters: \n{more}{_text(definition)}")
        for shape in data_shapes:
            self.info(f"output data size: {','.join(map(str, shape))}")
        for name in outputs:
            self.info(f"This network produces output {name}")
        self.info("Network initialization done.")

    def debug_info(self, text: str, value: float) -> None:
        """A line of ``debug_info``: which blob, and the mean of its absolute values or of its gradient's."""
        self.info(f"{text}{number(value)}")

    def all_parameters(self, sums: Sequence[float], norms: Sequence[float]) -> None:
        """The L1 and L2 norms of all weights and of their gradients, which Caffe logs as an error."""
        write_line(
            "E",
            "    [Backward] All net params (data, diff): "
            f"L1 norm = ({', '.join(map(number, sums))}); L2 norm = ({', '.join(map(number, norms))})",
            self._source,
        )

    def train_progress(self, iteration: int, seconds: float, iterations: int, loss: float) -> None:
        """``iterations`` counts those since the last such line, which took ``seconds``."""
        rate = iterations / seconds if seconds > 0 else 0.0
        self.info(
            f"Iteration {iteration} ({number(rate)} iter/s, {number(seconds)}s/{iterations} iter), "
            f"loss = {number(loss)}"
        )

    def rate(self, iteration: int, rate: float, momentum: float | None) -> None:
        """The learning rate of an iteration; with a ``momentum``, as the fork shows it."""
        shown = "" if momentum is None else f", m = {number(momentum)}"
        self.info(f"Iteration {iteration}, lr = {number(rate)}{shown}")

    def test_loss(self, loss: float) -> None:
        """The weighted loss of a test, for a solver with ``test_compute_loss``."""
        self.info(f"Test loss: {number(loss)}")

    def last_loss(self, iteration: int, loss: float) -> None:
        """The loss of the final weights, over one more batch."""
        self.info(f"Iteration {iteration}, loss = {number(loss)}")

    def writes_weights(self, path: Path) -> None:
        """A ``.caffemodel`` that is written next."""
        self.info(f"Snapshotting to {_form(path)} file {path}")

    def writes_state(self, path: Path) -> None:
        """A ``.solverstate`` that is written next."""
        self.info(f"Snapshotting solver state to {_form(path)} file {path}")

    def recalibrates(self, layers: int, batches: int) -> None:
        """The final recalibration of ``layers`` batch-norm layers begins."""
        if layers:
            self.info(f"Recalibrating the statistics of {layers} batch-norm layers over {batches} batches")
        else:
            self.info("No batch-norm statistics to recalibrate")

    def trains_quantized(self, scheme: str, weights: int, activations: int, settle: int, freeze: int) -> None:
        """Quantization-aware training: its scheme and bits, and until when ranges and statistics move."""
        self.info(
            f"Quantization-aware training: scheme {scheme}, weights of {weights} bits, activations of "
            f"{activations} bits; ranges settle until iteration {settle}, batch-norm statistics are frozen "
            f"from iteration {freeze} on"
        )

    def test_begins(
        self,
        iteration: int,
        index: int,
        recalibrated_over: int = 0,
        *,
        averaged: bool = False,
        quantized: bool = False,
    ) -> None:
        """A test of net ``index``; ``recalibrated_over``: batches of its statistics, 0 for running ones.

        ``averaged``: with the moving average of the weights; ``quantized``: in quantized values.
        """
        self.info(f"Iteration {iteration}, Testing net (#{index})")
        if averaged:
            self.info("    Test weights: their moving average (ema_decay)")
        if recalibrated_over:
            self.info(f"    Test statistics: recalibrated over {recalibrated_over} batches")
        if quantized:
            self.info("    Test values: quantized")

    def test_interrupted(self) -> None:
        """A test ends before its last batch."""
        self.info("Test interrupted.")

    def outputs(self, kind: str, values: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> None:
        """The numbers of each output of the ``Train`` or ``Test`` net; ``weights`` has those of losses."""
        listed = [(name, value) for name, numbers in values.items() for value in numbers]
        for index, (name, value) in enumerate(listed):
            self.info(f"    {kind} net output #{index}: {name} = {weighted(value, weights.get(name, 0.0))}")

    def sparsity(
        self, zeros: Mapping[str, int], counts: Mapping[str, int], *, inner_products: bool = False
    ) -> None:
        """Zeros and weights of each layer by name, and over all; whether inner products are among them."""
        self.info("Sparsity after update:")
        which = ", inner products included" if inner_products else ""
        self.info(f"Num Params({len(counts)}){which}, Sparsity (zero_weights/count): ")
        for name in sorted(counts):
            self.info(f"{name}_param_0({zeros[name] / counts[name]:.3g}) ")
        total, count = sum(zeros.values()), sum(counts.values())
        self.info(
            f"Total Sparsity (zero_weights/count) =  ({number(total)}/{number(count)}) "
            f"{total / count if count else 0:.3g}"
        )


def weighted(value: float, loss_weight: float) -> str:
    """An output's value, with its part of the loss if it is one."""
    loss = f" (* {number(loss_weight)} = {number(loss_weight * value)} loss)" if loss_weight else ""
    return f"{number(value)}{loss}"


def _form(path: Path) -> str:
    """What Caffe calls the form of a snapshot's file."""
    return "HDF5" if path.suffix == SUFFIX else "binary proto"


def _text(message: Any) -> str:
    from google.protobuf import text_format

    return str(text_format.MessageToString(message, as_utf8=True)).rstrip()
