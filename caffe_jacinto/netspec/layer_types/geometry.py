"""Kernels, strides, padding and dilation: what a layer says, and what Caffe stops at.

Rules: LayerSetUp of Caffe 1.0's base_conv_layer.cpp, im2col_layer.cpp and pooling_layer.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from caffe_jacinto.netspec.layer_types.base import Shape
from caffe_jacinto.prototxt.tree import Message

_HALVES = {"kernel_size": "kernel", "stride": "stride", "pad": "pad"}
"""What ``_h`` and ``_w`` are appended to for height and width alone, by the field for both."""

_DEFAULTS = {"kernel_size": 0, "stride": 1, "pad": 0, "dilation": 1}


class Geometry(NamedTuple):
    """Kernel, stride, pad and dilation of a convolution or pooling for each spatial axis (height, width)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilation: tuple[int, ...]


class GeometryFault(NamedTuple):
    """A setting at which Caffe stops."""

    field: str
    """Its path in the layer: ``convolution_param.stride_w``."""

    what: str
    """What is wrong with it, and what to do."""


def channel_axis(layer: Message, shape: Shape) -> int:
    """The axis of the channels of a bottom of this shape; those after it are spatial."""
    return _parameter(layer).integer("axis", 1) % len(shape)


def spatial_axes(layer: Message, shape: Shape | None) -> int | None:
    """How many spatial axes a bottom of this shape has; None where nothing is known of it."""
    return len(shape) - 1 - channel_axis(layer, shape) if shape else None


def geometry(layer: Message, axes: int | None = 2) -> Geometry:
    """The geometry of a Convolution, Deconvolution, Im2col or Pooling layer over ``axes`` spatial axes.

    Where their number is not known, it is that of the kernels that are given, or else 2.

    Raises:
        ValueError: Caffe stops at it: see `geometry_fault`.
    """
    fault = geometry_fault(layer, axes)
    if fault is not None:
        raise ValueError(f"{fault.field}: {fault.what}")
    parameter, pooling = _parameter(layer), layer.string("type") == "Pooling"
    if axes is None:
        axes = max(2, *(len(parameter.integers(name)) for name in _DEFAULTS))

    def setting(name: str) -> tuple[int, ...]:
        # Pooling takes kernel_size with one of kernel_h and kernel_w beside it, and passes over that.
        if _given_halves(parameter, name) and not (pooling and parameter.has(name)):
            # A convolution's padding that is given for one axis is 0 for the other.
            return tuple(parameter.integer(f"{_HALVES[name]}_{axis}") for axis in "hw")
        values = parameter.integers(name) or [_DEFAULTS[name]]
        return tuple(values * axes if len(values) == 1 else values)

    return Geometry(*map(setting, _DEFAULTS))


def geometry_fault(layer: Message, axes: int | None = 2) -> GeometryFault | None:
    """The first setting of the layer's geometry at which Caffe stops, or divides by zero.

    Where the number of spatial ``axes`` is None, it is not known, and no reason to stop.
    """
    pooling = layer.string("type") == "Pooling"
    parameter, message = _parameter(layer), "pooling_param" if pooling else "convolution_param"
    found = _pooling_faults(parameter) if pooling else _convolution_faults(parameter, axes)
    return next((GeometryFault(f"{message}.{field}", what) for field, what in found), None)


def _parameter(layer: Message) -> Message:
    return layer.message("pooling_param" if layer.string("type") == "Pooling" else "convolution_param")


def _given_halves(parameter: Message, name: str) -> list[str]:
    if name not in _HALVES:
        return []
    return [field for axis in "hw" if parameter.has(field := f"{_HALVES[name]}_{axis}")]


def _convolution_faults(parameter: Message, axes: int | None) -> Iterator[tuple[str, str]]:
    for name in _DEFAULTS:
        given, halves = parameter.integers(name), _given_halves(parameter, name)
        if halves and axes not in (2, None):
            yield halves[0], f"the input has {axes} spatial axes, and height and width are 2; use {name}"
        elif halves and given:
            yield halves[0], f"{name} is given, too; remove one of them"
        elif halves and len(halves) == 1 and name != "pad":
            other = _other(halves[0])
            yield other, f"is missing, and {halves[0]} is given; add it, or give {name} alone"
        elif halves:
            zero = next((field for field in halves if parameter.integer(field) < 1), None)
            if zero is not None and name != "pad":
                yield zero, "is 0; it has to be at least 1"
        elif len(given) > 1 and axes is not None and len(given) != axes:
            yield (
                name,
                f"is given {len(given)} times; give it once, or {axes} times: once for each spatial axis",
            )
        elif not given and name == "kernel_size" and axes != 0:
            yield name, "is missing; add it"
        elif name in ("kernel_size", "stride") and any(value < 1 for value in given):
            yield name, "is 0; it has to be at least 1"


def _pooling_faults(parameter: Message) -> Iterator[tuple[str, str]]:
    whole = parameter.flag("global_pooling")
    for name in _HALVES:
        halves, both = _given_halves(parameter, name), parameter.has(name)
        if name == "kernel_size" and whole:
            if halves or both:
                yield (halves or [name])[0], "global_pooling takes the whole image; remove it"
        elif len(halves) == 2 and both:
            yield halves[0], f"{name} is given, too; remove one of them"
        elif len(halves) == 1 and not (both and name == "kernel_size"):
            other = _other(halves[0])
            yield other, f"is missing, and {halves[0]} is given; add it, or give {name} alone"
        elif name == "kernel_size" and not halves and not both:
            yield name, "is missing; add it"
    sizes = {name: _pair(parameter, name) for name in _HALVES}
    for name in ("stride",) if whole else ("kernel_size", "stride"):
        if min(sizes[name]) < 1:
            yield (_given_halves(parameter, name) or [name])[0], "is 0; it has to be at least 1"
    field = (_given_halves(parameter, "pad") or ["pad"])[0]
    if whole and (any(sizes["pad"]) or sizes["stride"] != (1, 1)):
        field = field if any(sizes["pad"]) else (_given_halves(parameter, "stride") or ["stride"])[0]
        yield field, "global_pooling takes the whole image; remove it"
    elif any(sizes["pad"]) and parameter.string("pool", "MAX") == "STOCHASTIC":
        yield field, "STOCHASTIC pooling has no padding; remove it"
    elif any(sizes["pad"]) and any(
        pad >= kernel for pad, kernel in zip(sizes["pad"], sizes["kernel_size"], strict=True)
    ):
        yield field, "is as large as the kernel; make it smaller"


def _pair(parameter: Message, name: str) -> tuple[int, int]:
    """Height and width; a half alone counts only beside ``kernel_size``, which then holds for both."""
    if len(_given_halves(parameter, name)) == 2:
        return parameter.integer(f"{_HALVES[name]}_h"), parameter.integer(f"{_HALVES[name]}_w")
    both = parameter.integer(name, _DEFAULTS[name])
    return both, both


def _other(half: str) -> str:
    return f"{half[:-1]}{'w' if half.endswith('h') else 'h'}"
