"""Functions of each value alone, dropout and softmax."""

from __future__ import annotations

from collections.abc import Callable
from math import log

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


def plain(function: Callable[[Tensor], Tensor]) -> Builder:
    """The builder of a layer without settings: ``function`` of each value."""

    def build(layer: LayerSetup) -> Forward:
        layer.takes(1)
        parameter = PARAMETERS.get(layer.message.type)
        if parameter:
            layer.parameters(parameter)
        else:
            layer.only()
        return lambda blobs, values: function(values)

    return build


PARAMETERS = {"Sigmoid": "sigmoid_param", "TanH": "tanh_param"}
"""Those whose only field, ``engine``, has no effect."""


def elu(layer: LayerSetup) -> Forward:
    """x where it is positive, else alpha (e^x - 1)."""
    layer.takes(1)
    alpha = layer.parameters("elu_param", "alpha").alpha
    return lambda blobs, values: F.elu(values, alpha)


def exp(layer: LayerSetup) -> Forward:
    """base ^ (scale x + shift); a base of -1 is e."""
    layer.takes(1)
    fields = layer.parameters("exp_param", "base", "scale", "shift")
    logarithm = _logarithm(layer, "exp_param", fields.base)
    scale, shift = logarithm * fields.scale, logarithm * fields.shift
    return lambda blobs, values: torch.exp(values.float() * scale + shift)


def logarithm(layer: LayerSetup) -> Forward:
    """The logarithm to the base ``base`` of scale x + shift; a base of -1 is e."""
    layer.takes(1)
    fields = layer.parameters("log_param", "base", "scale", "shift")
    of_base = _logarithm(layer, "log_param", fields.base)
    if not of_base:
        layer.refuse("log_param.base 1 has no logarithm")
    scale, shift = fields.scale, fields.shift
    return lambda blobs, values: torch.log(values.float() * scale + shift) / of_base


def _logarithm(layer: LayerSetup, parameter: str, base: float) -> float:
    if base == -1:
        return 1.0
    if base <= 0:
        layer.refuse(f"{parameter}.base {base:g} has to be positive, or -1 for e")
    return log(base)


def clip(layer: LayerSetup) -> Forward:
    """x, but no less than ``min`` and no more than ``max``; outside of these, no gradient."""
    layer.takes(1)
    fields = layer.parameters("clip_param", "min", "max")
    least, most = fields.min, fields.max
    if not (fields.HasField("min") and fields.HasField("max")) or least > most:
        layer.refuse("clip_param needs min and max, and min no larger than max")
    return lambda blobs, values: values.clamp(least, most)


def swish(layer: LayerSetup) -> Forward:
    """x sigmoid(beta x)."""
    layer.takes(1)
    beta = layer.parameters("swish_param", "beta").beta
    return lambda blobs, values: values * torch.sigmoid(values * beta)


def threshold(layer: LayerSetup) -> Forward:
    """1 above the threshold, else 0; no gradient passes."""
    layer.takes(1)
    limit = layer.parameters("threshold_param", "threshold").threshold
    return lambda blobs, values: (values > limit).to(values.dtype)


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
    "AbsVal": plain(torch.abs),
    "BNLL": plain(lambda values: F.softplus(values.float())),
    "Clip": clip,
    "Dropout": dropout,
    "ELU": elu,
    "Exp": exp,
    "Log": logarithm,
    "Power": power,
    "PReLU": prelu,
    "ReLU": relu,
    "Sigmoid": plain(torch.sigmoid),
    "Softmax": softmax,
    "Swish": swish,
    "TanH": plain(torch.tanh),
    "Threshold": threshold,
}
