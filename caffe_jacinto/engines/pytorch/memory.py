"""How large a batch the memory of a GPU holds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import suppress

import torch

from caffe_jacinto.engines.pytorch.engine import Options
from caffe_jacinto.engines.pytorch.feed import Inputs
from caffe_jacinto.engines.pytorch.layer_setup import Shape
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.engines.pytorch.precision import autocast
from caffe_jacinto.prototxt.solver import TRAIN, SolverFile

_COPIES = 4
"""Of each blob: weights, gradient, history and one for the update."""

_KEPT_FREE = 0.06
"""Share of the memory that algorithms and the memory's own pieces take."""

_MEASURED_SHARE = 1 / 32
"""Passes are measured up to this share of the memory: in small ones, what does not grow with the batch hides
what does."""


def batch_that_fits(solver: SolverFile, device: torch.device, options: Options) -> int | None:
    """The largest batch that the training should fit with; see `largest_batch`."""
    # Still "auto": the memory was too small to choose in; then bf16 is what is taken where it is just enough.
    precision = "bf16" if options.precision == "auto" else options.precision
    with Inputs(
        solver.train_net, TRAIN, str(solver.train_file), device=torch.device("cpu"), seed=0, workers=1
    ) as inputs:
        return largest_batch(solver, inputs.shapes, device, precision)


def largest_batch(
    solver: SolverFile, shapes: Mapping[str, Shape], device: torch.device, precision: str
) -> int | None:
    """The largest batch that should fit, from passes with small ones; None where these cannot be run.

    ``shapes`` are those of the Data layers' tops. Nothing else may be in the GPU's memory.
    """
    _free()
    with suppress(Exception):
        return _largest(lambda batch: _peak(solver, shapes, device, precision, batch), _available(device))
    return None


def _largest(peak: Callable[[int], float], available: float) -> int:
    """The largest batch whose ``peak`` of bytes, which grows evenly with it, is ``available``."""
    batch, before, now = 4, peak(2), peak(4)
    while now < _MEASURED_SHARE * available:
        batch *= 2
        before, now = now, peak(batch)
    each = (now - before) / (batch / 2)
    return max(int((available * (1 - _KEPT_FREE) - (now - each * batch)) / each), 0)


def _peak(
    solver: SolverFile, shapes: Mapping[str, Shape], device: torch.device, precision: str, batch: int
) -> float:
    """Bytes that an iteration with ``batch`` images takes at most."""
    _free()
    torch.cuda.reset_peak_memory_stats(device)
    small = {name: (batch, *shape[1:]) for name, shape in shapes.items()}
    net = Net(solver.train_net, TRAIN, solver.dialect, where="", seed=0, device=device, data_shapes=small)
    values = {name: torch.zeros(net.shapes[name], device=device) for name in net.inputs}
    for _ in range(2):  # the first pass also tries algorithms, some of them with more memory
        torch.cuda.reset_peak_memory_stats(device)
        with autocast(device, precision):
            loss = net(values).loss
        loss.backward()
    blobs = sum(blob.tensor.numel() * blob.tensor.element_size() for _, _, blob in net.blobs)
    peak = torch.cuda.max_memory_allocated(device) + (_COPIES - 2) * blobs
    del net, values, loss
    _free()
    return float(peak)


def _available(device: torch.device) -> float:
    """Bytes that this process may take."""
    free, total = torch.cuda.mem_get_info(device)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return float(min(free, fraction * total))


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
