"""Convolutions and deconvolutions, and the windows that they read."""

from __future__ import annotations

from caffe_jacinto.netspec.layer_types.base import (
    WEIGHTS,
    Dim,
    LayerType,
    Shape,
    Shapes,
    first_of,
    image,
    product,
    with_bias,
)
from caffe_jacinto.netspec.layer_types.geometry import channel_axis, geometry, spatial_axes
from caffe_jacinto.prototxt.tree import Message


def _convolution(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    first = image(bottoms)
    channel = channel_axis(layer, first)
    kernel, stride, pad, dilation = geometry(layer, spatial_axes(layer, first_of(bottoms)))
    sizes: list[Dim] = []
    for axis, size in enumerate(first[channel + 1 :]):
        extent = dilation[axis] * (kernel[axis] - 1) + 1
        if size is None:
            sizes.append(None)
        elif layer.string("type") == "Deconvolution":
            sizes.append(stride[axis] * (size - 1) + extent - 2 * pad[axis])
        else:
            sizes.append((size + 2 * pad[axis] - extent) // stride[axis] + 1)
    return [(*first[:channel], layer.message("convolution_param").integer("num_output"), *sizes)] * tops


def _convolution_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    parameter = layer.message("convolution_param")
    group, outputs = max(parameter.integer("group", 1), 1), parameter.integer("num_output")
    first = first_of(bottoms)
    channels = None if first is None else first[channel_axis(layer, first)]
    kernel = geometry(layer, spatial_axes(layer, first)).kernel
    if layer.string("type") == "Deconvolution":
        return with_bias(parameter, (channels, outputs // group, *kernel))
    return with_bias(parameter, (outputs, None if channels is None else channels // group, *kernel))


def _windows(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """Im2col: a convolution's, with a channel for each number that one of its outputs reads."""
    (found,) = _convolution(layer, bottoms, 1)
    first = image(bottoms)
    channel = channel_axis(layer, first)
    kernel = geometry(layer, spatial_axes(layer, first)).kernel
    if found is None:
        return [None]
    return [(*found[:channel], product((first[channel], *kernel)), *found[channel + 1 :])]


TYPES: dict[str, LayerType] = {
    "Convolution": LayerType(_convolution, _convolution_blobs, WEIGHTS, "convolution"),
    "Im2col": LayerType(_windows),
    "Deconvolution": LayerType(_convolution, _convolution_blobs, WEIGHTS, "convolution"),
}
