"""The two dialects of Caffe's files, and where they differ in names and numbers."""

from __future__ import annotations

from enum import Enum

from caffe_jacinto.common.errors import UserError


class Dialect(str, Enum):
    """Which Caffe a file is written for."""

    BVLC = "bvlc"
    """Stock Caffe 1.0."""

    CAFFE_JACINTO = "caffe_jacinto"
    """The fork, on NVCaffe 0.16 and 0.17."""


FORK_MIN_EPS = 1e-5
"""The least ``eps`` of a batch norm in the fork (CUDNN_BN_MIN_EPSILON); it raises a smaller one to this."""


def scale_name(batch_norm: str) -> str:
    """The Scale layer that goes with a BatchNorm of stock Caffe: its last ``bn`` becomes ``scale``."""
    start, found, end = batch_norm.rpartition("bn")
    return f"{start}scale{end}" if found else f"{batch_norm}/scale"


def file_batch(dialect: Dialect, effective_batch: int, iter_size: int, gpu_count: int) -> int:
    """The ``batch_size`` to write in train.prototxt, in images.

    ``effective_batch`` is the number of images of one update of the weights, over ``iter_size`` passes and
    ``gpu_count`` devices (0: the CPU). Stock Caffe takes the file's batch on each GPU; the fork divides it
    among its GPUs.

    Raises:
        UserError: the batch does not divide into equal shares; the nearest ones that do are named.
    """
    if min(effective_batch, iter_size) < 1 or gpu_count < 0:
        raise UserError(
            f"a batch of {effective_batch} in {iter_size} passes over {gpu_count} GPUs: "
            "the batch and the passes have to be at least 1"
        )
    devices = max(gpu_count, 1)
    shares = iter_size * devices
    if effective_batch % shares:
        raise UserError(_does_not_divide(effective_batch, iter_size, devices))
    per_device = effective_batch // shares
    return per_device if dialect is Dialect.BVLC else per_device * devices


def _does_not_divide(effective_batch: int, iter_size: int, devices: int) -> str:
    shares = iter_size * devices
    below = effective_batch // shares * shares
    nearest = [str(batch) for batch in (below, below + shares) if batch > 0]
    what = f"{iter_size} pass{'es' if iter_size > 1 else ''} (iter_size)"
    where = f" over {devices} GPUs or ranks" if devices > 1 else ""
    return (
        f"an effective batch of {effective_batch} does not divide into {what}{where}, {shares} equal shares; "
        f"use {' or '.join(nearest)}"
    )
