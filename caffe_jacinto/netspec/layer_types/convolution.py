"""Convolutions and deconvolutions, and the windows that they read."""

from __future__ import annotations

from caffe_jacinto.netspec.layer_types.base import (
    WEIGHTS,
    Dim,
    LayerType,
    Shape,
    Shapes,
    channels_of,
    first_of,
    image,
    product,
    with_bias,
)
from caffe_jacinto.netspec.layer_types.geometry import geometry
from caffe_jacinto.prototxt.tree import Message


def _convolution(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    first = image(bottoms)
    kernel, stride, pad, dilation = geometry(layer, len(first) - 2)
    sizes: list[Dim] = []
    for axis, size in enumerate(first[2:]):
        extent = dilation[axis] * (kernel[axis] - 1) + 1
        if size is None:
            sizes.append(None)
        elif layer.string("type") == "Deconvolution":
            sizes.append(stride[axis] * (size - 1) + extent - 2 * pad[axis])
        else:
            sizes.append((size + 2 * pad[axis] - extent) // stride[axis] + 1)
    return [(first[0], layer.message("convolution_param").integer("num_output"), *sizes)] * tops


def _convolution_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    parameter = layer.message("convolution_param")
    group, outputs = max(parameter.integer("group", 1), 1), parameter.integer("num_output")
    channels = channels_of(bottoms)
    first = first_of(bottoms)
    kernel = geometry(layer, 2 if first is None else max(len(first) - 2, 1)).kernel
    if layer.string("type") == "Deconvolution":
        return with_bias(parameter, (channels, outputs // group, *kernel))
    return with_bias(parameter, (outputs, None if channels is None else channels // group, *kernel))


def _windows(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """Im2col: a convolution's, with a channel for each number that one of its outputs reads."""
    (found,) = _convolution(layer, bottoms, 1)
    kernel = geometry(layer, len(image(bottoms)) - 2).kernel
    return [None if found is None else (found[0], product((channels_of(bottoms), *kernel)), *found[2:])]


TYPES: dict[str, LayerType] = {
    "Convolution": LayerType(_convolution, _convolution_blobs, WEIGHTS, "convolution"),
    "Im2col": LayerType(_windows),
    "Deconvolution": LayerType(_convolution, _convolution_blobs, WEIGHTS, "convolution"),
}
