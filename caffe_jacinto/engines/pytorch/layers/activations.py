"""Functions of each value alone, dropout and softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from caffe_jacinto.engines.pytorch.layer_setup import Blobs, Builder, Forward, LayerSetup
from caffe_jacinto.prototxt.solver import TRAIN


def relu(layer: LayerSetup) -> Forward:
    layer.takes(1)
    slope = layer.parameters("relu_param", "negative_slope").negative_slope
    if slope:
        return lambda blobs, values: F.leaky_relu(values, slope)
    return lambda blobs, values: torch.relu(values)


def prelu(layer: LayerSetup) -> Forward:
    layer.takes(1)
    fields = layer.parameters("prelu_param", "filler", "channel_shared")
    (shape,) = layer.bottoms
    if len(shape) < 2:
        layer.refuse("needs a bottom with channels")
    layer.blob(fields.filler if fields.HasField("filler") else None, constant=0.25)
    return lambda blobs, values: F.prelu(values, blobs[0].to(values.dtype).reshape(-1))


def power(layer: LayerSetup) -> Forward:
    layer.takes(1)
    fields = layer.parameters("power_param", "power", "scale", "shift")
    exponent, scale, shift = fields.power, fields.scale, fields.shift

    def forward(blobs: Blobs, values: Tensor) -> Tensor:
        if scale != 1:
            values = values * scale
        if shift:
            values = values + shift
        return values if exponent == 1 else values.pow(exponent)

    return forward


def dropout(layer: LayerSetup) -> Forward:
    layer.takes(1)
    ratio = layer.parameters("dropout_param", "dropout_ratio").dropout_ratio
    if not 0 <= ratio < 1:
        layer.refuse(f"dropout_param.dropout_ratio {ratio:g} has to be from 0 to below 1")
    if layer.phase != TRAIN or ratio == 0:
        return lambda blobs, values: values
    layer.draws = True
    return lambda blobs, values: F.dropout(values, ratio)


def softmax(layer: LayerSetup) -> Forward:
    layer.takes(1)
    axis = layer.axis(layer.parameters("softmax_param", "axis").axis)
    return lambda blobs, values: F.softmax(values.float(), axis)


LAYERS: dict[str, Builder] = {
    "Dropout": dropout,
    "Power": power,
    "PReLU": prelu,
    "ReLU": relu,
    "Softmax": softmax,
}
