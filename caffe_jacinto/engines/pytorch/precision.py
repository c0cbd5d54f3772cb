"""The precision of convolutions and inner products: what each means to PyTorch, and which is fastest."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Literal

import torch
from torch import Tensor

from caffe_jacinto.engines.pytorch import gpu_time
from caffe_jacinto.engines.pytorch.layer_setup import Shape
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.prototxt.solver import TRAIN, SolverFile

Precise = Literal["fp32", "tf32", "bf16"]

_TIMED = 3
"""Passes that are timed, after one that is not."""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which convolutions and inner products compute in bfloat16, if ``precision`` is bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def allow_tf32(precision: str) -> None:
    """Let NVIDIA's GPUs round the factors of products to 10 bits, if ``precision`` is tf32; fp32 is exact."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def fastest(solver: SolverFile, shapes: Mapping[str, Shape], device: torch.device) -> tuple[Precise, str]:
    """The precision in which passes over images of zeros are fastest; and a line for the log that says so.

    ``shapes`` are those of the Data layers' tops.
    """
    net = Net(solver.train_net, TRAIN, solver.dialect, where="", seed=0, device=device, data_shapes=shapes)
    values = {name: torch.zeros(net.shapes[name], device=device) for name in net.inputs}
    tried: tuple[Precise, ...] = ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32", "bf16")
    times: dict[Precise, float] = {}
    for precision in tried:
        allow_tf32(precision)
        with suppress(torch.OutOfMemoryError):
            times[precision] = _seconds(net, values, device, precision)
        net.zero_grad()
    if not times:
        raise torch.OutOfMemoryError("a pass fits into the memory in no precision")
    shown = ", ".join(f"{name} {1000 * spent:.1f} ms" for name, spent in times.items())
    best = min(times, key=lambda name: times[name])
    return best, f"Computing in {best}: a pass forward and backward takes {shown}"


def _seconds(net: Net, values: Mapping[str, Tensor], device: torch.device, precision: str) -> float:
    """The time of one pass forward and backward."""

    def run() -> None:
        with autocast(device, precision):
            loss = net(values).loss
        if loss.requires_grad:
            loss.backward()

    if device.type == "cuda":
        return gpu_time.milliseconds(run) / 1000
    run()
    started = time.perf_counter()
    for _ in range(_TIMED):
        run()
    return (time.perf_counter() - started) / _TIMED
