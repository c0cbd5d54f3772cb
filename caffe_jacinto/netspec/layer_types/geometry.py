"""Kernels, strides, padding and dilation."""

from __future__ import annotations

from typing import NamedTuple

from caffe_jacinto.prototxt.tree import Message


class Geometry(NamedTuple):
    """Kernel, stride, pad and dilation of a convolution or pooling for each spatial axis (height, width)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilation: tuple[int, ...]


def geometry(layer: Message, axes: int = 2) -> Geometry:
    """The geometry of a Convolution, Deconvolution or Pooling layer over ``axes`` spatial axes."""
    pooling = layer.string("type") == "Pooling"
    parameter = layer.message("pooling_param" if pooling else "convolution_param")

    def setting(name: str, default: int) -> tuple[int, ...]:
        short = name.removesuffix("_size")
        # Pooling reads height and width where the height is given, a convolution where either is.
        if parameter.has(f"{short}_h") or (parameter.has(f"{short}_w") and not pooling):
            return parameter.integer(f"{short}_h", default), parameter.integer(f"{short}_w", default)
        values = parameter.integers(name) or [default]
        return tuple((values * axes if len(values) == 1 else values)[:axes])

    kernel, dilation = setting("kernel_size", 0), setting("dilation", 1)
    return Geometry(kernel, setting("stride", 1), setting("pad", 0), dilation)
