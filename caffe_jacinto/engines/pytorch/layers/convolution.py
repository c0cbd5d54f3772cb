"""Convolutions and deconvolutions, and the windows that they read."""

from __future__ import annotations

from dataclasses import astuple

import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from caffe_jacinto.engines.pytorch.convolutions import Convolution, Geometry
from caffe_jacinto.engines.pytorch.layer_setup import Blobs, Builder, Forward, LayerSetup


def convolution(layer: LayerSetup) -> Forward:
    convolve = convolution_of(layer)
    return lambda blobs, images: convolve(images, *with_bias(blobs))


def convolution_of(layer: LayerSetup) -> Convolution:
    """The convolution of a layer, whose blobs are made."""
    return Convolution(_prepared(layer))


def deconvolution(layer: LayerSetup) -> Forward:
    """What the gradient of a convolution with the same settings computes, from its outputs to its inputs."""
    stride, pad, dilation, group = astuple(_prepared(layer))

    def forward(blobs: Blobs, images: Tensor) -> Tensor:
        weights, bias = with_bias(blobs)
        return F.conv_transpose2d(images, weights, bias, stride, pad, 0, group, dilation)

    return forward


def _prepared(layer: LayerSetup) -> Geometry:
    """The checked geometry of a convolution or deconvolution, whose blobs are made."""
    layer.takes(1)
    fields = layer.parameters(
        "convolution_param",
        *("num_output", "bias_term", "pad", "pad_h", "pad_w", "kernel_size", "kernel_h", "kernel_w"),
        *("stride", "stride_h", "stride_w", "dilation", "group", "weight_filler", "bias_filler", "axis"),
    )
    (shape,) = layer.bottoms
    if len(shape) != 4 or layer.axis(fields.axis) != 1:
        layer.refuse("convolves batch x channels x height x width only (axis 1)")
    kernel, stride, pad, dilation = layer.geometry()
    outputs, group = fields.num_output, fields.group
    if min(*kernel, *stride, *dilation, outputs, group) < 1 or shape[1] % group or outputs % group:
        layer.refuse(
            f"{shape[1]} channels to {outputs} outputs in {group} groups by {kernel[0]}x{kernel[1]} kernels: "
            "sizes have to be at least 1, and channels and outputs multiples of group"
        )
    if min(layer.tops[0]) < 1:
        if layer.message.type == "Deconvolution":
            layer.refuse(f"its padding leaves nothing of the {shape[2]}x{shape[3]} pixels that it is given")
        layer.refuse(f"its kernel is larger than the {shape[2]}x{shape[3]} pixels that it is given")
    layer.blob(fields.weight_filler)
    if fields.bias_term:
        layer.blob(fields.bias_filler)
    return Geometry(stride, pad, dilation, group)


def windows(layer: LayerSetup) -> Forward:
    """Im2col: the pixels that each place of a convolution reads, as channels."""
    layer.takes(1)
    fields = layer.parameters(
        "convolution_param",
        *("pad", "pad_h", "pad_w", "kernel_size", "kernel_h", "kernel_w", "stride", "stride_h", "stride_w"),
        *("dilation", "axis"),
    )
    (shape,) = layer.bottoms
    if len(shape) != 4 or layer.axis(fields.axis) != 1:
        layer.refuse("reads batch x channels x height x width only (axis 1)")
    kernel, stride, pad, dilation = layer.geometry()
    if min(*kernel, *stride, *dilation) < 1 or min(layer.tops[0]) < 1:
        layer.refuse(f"its {kernel[0]}x{kernel[1]} windows do not fit the {shape[2]}x{shape[3]} pixels")
    top = layer.tops[0][1:]
    return lambda blobs, images: F.unfold(images, kernel, dilation, pad, stride).reshape(-1, *top)


def with_bias(blobs: Blobs) -> tuple[Tensor, Tensor | None]:
    """Weights, and the bias if there is one."""
    return blobs[0], blobs[1] if len(blobs) > 1 else None


LAYERS: dict[str, Builder] = {
    "Convolution": convolution,
    "Deconvolution": deconvolution,
    "Im2col": windows,
}
