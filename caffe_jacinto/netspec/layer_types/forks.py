"""Layers that forks of Caffe added.

Written from what their authors published: SegNet and PSPNet (BN), SSD (Permute, Normalize), ShuffleNet's
forks (ShuffleChannel, ConvolutionDepthwise), SENet (Axpy), DeepLab (Interp), SegNet and darknet (Upsample).
"""

from __future__ import annotations

from typing import NamedTuple

from caffe_jacinto.netspec.layer_types import convolution
from caffe_jacinto.netspec.layer_types.base import (
    WEIGHTS,
    Dim,
    LayerType,
    Shape,
    Shapes,
    channels_of,
    first_of,
    image,
    required,
    same,
)
from caffe_jacinto.netspec.layer_types.geometry import geometry, spatial_axes
from caffe_jacinto.prototxt.forks import DEPTHWISE
from caffe_jacinto.prototxt.tree import Message

_WITH_AVERAGES = ("slope_filler", "bias_filler", "momentum", "eps", "frozen")
"""Fields of bn_param that only the BN layer with moving averages has."""

_GRID = convolution.TYPES["Convolution"].tops


def keeps_averages(layer: Message) -> bool:
    """Whether a BN layer is PSPNet's (yjxiong's), of four blobs, and not SegNet's, of two."""
    return any(layer.message("bn_param").has(field) for field in _WITH_AVERAGES)


def _depthwise(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """A convolution's, with the channels of the input."""
    (found,) = _GRID(layer, bottoms, 1)
    return [None if found is None else (found[0], channels_of(bottoms), *found[2:])]


def _depthwise_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    channels = channels_of(bottoms)
    first = first_of(bottoms)
    kernel = geometry(layer, spatial_axes(layer, first)).kernel
    bias = layer.message("convolution_param").flag("bias_term", True)
    return [(channels, 1, *kernel), (channels,)] if bias else [(channels, 1, *kernel)]


def _bn_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    return [(1, channels_of(bottoms), 1, 1)] * (4 if keeps_averages(layer) else 2)


def _normalize_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    return [() if layer.message("norm_param").flag("channel_shared", True) else (channels_of(bottoms),)]


def permuted_axes(layer: Message, axes: int) -> tuple[int, ...]:
    """Which axis of the bottom each axis of a Permute layer's top is: those it names, then the others."""
    named = layer.message("permute_param").integers("order")
    return (*named, *(axis for axis in range(axes) if axis not in named))


def _permute(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    shape = required(bottoms)
    return [tuple(shape[axis] for axis in permuted_axes(layer, len(shape)))]


def _axpy(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    return [bottoms[1]]


def gives_its_size(layer: Message) -> bool:
    """Whether the settings of an Interp layer give its size: then a second bottom does not (DeepLab v2)."""
    parameter = layer.message("interp_param")
    factors = parameter.has("shrink_factor") or parameter.has("zoom_factor")
    return factors or (parameter.has("height") and parameter.has("width"))


def _interp(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    shape = image(bottoms)
    if len(bottoms) == 2 and not gives_its_size(layer):
        return [(*shape[:2], *image(bottoms[1:])[2:])]
    return [(*shape[:2], *(interpolated(layer, size, axis) for axis, size in enumerate(shape[2:])))]


def interpolated(layer: Message, size: Dim, axis: int) -> Dim:
    """What an Interp layer makes of ``size`` pixels along an axis (0: height, 1: width)."""
    parameter = layer.message("interp_param")
    shrink, zoom = parameter.optional_integer("shrink_factor"), parameter.optional_integer("zoom_factor")
    fixed = parameter.has("height") and parameter.has("width")
    if (shrink is None and zoom is None) or (fixed and shrink is not None and zoom is not None):
        return parameter.integer(("height", "width")[axis])
    if size is None:
        return None
    size += parameter.integer("pad_beg") + parameter.integer("pad_end")
    if shrink is not None:
        size = (size - 1) // shrink + 1
    return size if zoom is None else size + (size - 1) * (zoom - 1)


class Upsampling(NamedTuple):
    """The settings of an Upsample layer."""

    scale: tuple[int, int]
    """Rows and columns that it makes of each."""

    size: tuple[int, int] | None
    """Height and width of its top, where they are given instead."""


def upsampling(layer: Message) -> Upsampling:
    """What an Upsample layer says, with its defaults."""
    parameter = layer.message("upsample_param")
    scale = parameter.integer("scale", 2 if len(layer.strings("bottom")) == 2 else 1)
    scales = (parameter.integer("scale_h", scale), parameter.integer("scale_w", scale))
    height, width = parameter.integer("upsample_h"), parameter.integer("upsample_w")
    return Upsampling(scales, (height, width) if height and width else None)


def _upsample(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    shape = image(bottoms)
    parameter, settings = layer.message("upsample_param"), upsampling(layer)
    if settings.size is not None:
        return [(*shape[:2], *settings.size)]
    less = [parameter.flag("pad_out_h"), parameter.flag("pad_out_w")]
    sizes = [
        None if size is None else size * scale - cut
        for size, scale, cut in zip(shape[2:], settings.scale, less, strict=True)
    ]
    return [(*shape[:2], *sizes)]


TYPES: dict[str, LayerType] = {
    **{kind: LayerType(_depthwise, _depthwise_blobs, WEIGHTS, "convolution") for kind in DEPTHWISE},
    "Axpy": LayerType(_axpy),
    "BN": LayerType(same, _bn_blobs, ("scale", "shift", "mean", "variance"), "follower"),
    "CuDNNBatchNorm": LayerType(same),
    "Interp": LayerType(_interp),
    "Normalize": LayerType(same, _normalize_blobs, ("scale",)),
    "Permute": LayerType(_permute),
    "ReLU6": LayerType(same, role="follower"),
    "ShuffleChannel": LayerType(same),
    "Upsample": LayerType(_upsample),
}
