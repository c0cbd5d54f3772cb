"""Batch norm, ReLU and 2x2 max pooling as one, on a CPU, by cpu_kernels.cpp; gpu_kernels.py is for GPUs.

Without a compiler, PyTorch's own functions are used, which read and write the images about twice as often.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caffe_jacinto.engines.pytorch.batch_norm import NormSettings
from caffe_jacinto.engines.pytorch.native import CompileError, load

_FLAGS = (
    "-mprefer-vector-width=512",
    # The backward pass computes again what the forward pass has rounded, and has to come to the same.
    "-ffp-contract=off",
)

_TYPES = (torch.float32, torch.bfloat16)

_ADDRESS, _INT = ctypes.c_void_p, ctypes.c_int


class NormRectifyPool(torch.autograd.Function):
    """Batch norm by the statistics of the batch, then ReLU and max pooling as the settings say."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        offset: Tensor | None,
        moments: Tensor,
        settings: NormSettings,
    ) -> Tensor:
        """``images``: batch x channels x height x width, channels last, of float32 or bfloat16; scale, shift
        and offset: one for each channel. ``moments`` (2 x channels) become the batch's mean and unbiased
        variance. ``offset`` is what a convolution's bias would have added: it shifts the mean and changes
        nothing else.
        """
        batch, channels, height, width = images.shape
        size = (height // 2, width // 2) if settings.pool else (height, width)
        result = images.new_empty((batch, *size, channels)).permute(0, 3, 1, 2)
        saved = moments.new_empty((4, channels))
        _library().norm_forward(
            *(_at(images), _at(scale), _at(shift), settings.eps, _sizes(images)),
            *(images.dtype == torch.bfloat16, settings.rectify, settings.pool),
            *(_at(saved), _at(moments), _at(result), torch.get_num_threads()),
        )
        if offset is not None:
            moments[0] += offset
        ctx.save_for_backward(images, saved)
        ctx.settings = settings
        ctx.given = (scale is not None, shift is not None, offset is not None)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, saved = ctx.saved_tensors
        settings: NormSettings = ctx.settings
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        found, result = torch.empty_like(saved), torch.empty_like(images)
        _library().norm_backward(
            *(_at(gradient), _at(images), _at(saved), _sizes(images)),
            *(images.dtype == torch.bfloat16, settings.rectify, settings.pool),
            *(_at(found), _at(result), torch.get_num_threads()),
        )
        scale, shift, offset = ctx.given
        # The batch norm subtracts what a bias adds: it gets no gradient.
        return (
            result,
            found[0] if scale else None,
            found[1] if shift else None,
            torch.zeros_like(found[0]) if offset else None,
            None,
            None,
        )


def takes(images: Tensor) -> bool:
    """Whether the kernels compute with such ``images``."""
    return images.dtype in _TYPES


@cache
def why_not() -> str | None:
    """Why the kernels cannot be used on this machine; None: they can."""
    try:
        _library()
    except CompileError as error:
        return str(error)
    return None


@cache
def _library() -> Any:
    library = load(Path(__file__).with_suffix(".cpp"), *_FLAGS)
    settings, results = (_INT,) * 3, (_ADDRESS,) * 3
    library.norm_forward.argtypes = (*(_ADDRESS,) * 3, ctypes.c_float, _ADDRESS, *settings, *results, _INT)
    library.norm_backward.argtypes = (_ADDRESS,) * 4 + settings + results[:2] + (_INT,)
    library.norm_forward.restype = library.norm_backward.restype = None
    return library


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _sizes(images: Tensor) -> Any:
    return (ctypes.c_int64 * 4)(*images.shape)
