"""Layers that multiply by weights or add them: inner products, Embed, Scale, Bias."""

from __future__ import annotations

from math import prod

import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from caffe_jacinto.engines.pytorch.layer_setup import Blobs, Builder, Forward, LayerSetup, Shape
from caffe_jacinto.engines.pytorch.layers.convolution import with_bias


def inner_product(layer: LayerSetup) -> Forward:
    layer.takes(1)
    fields = layer.parameters(
        "inner_product_param",
        *("num_output", "bias_term", "weight_filler", "bias_filler", "axis", "transpose"),
    )
    (shape,) = layer.bottoms
    axis = layer.axis(fields.axis)
    inputs, transposed = prod(shape[axis:]), fields.transpose
    if fields.num_output < 1:
        layer.refuse("inner_product_param.num_output has to be at least 1")
    layer.blob(fields.weight_filler)
    if fields.bias_term:
        layer.blob(fields.bias_filler)

    def forward(blobs: Blobs, values: Tensor) -> Tensor:
        flat = values.reshape(*values.shape[:axis], inputs)
        weights, bias = with_bias(blobs)
        return F.linear(flat, weights.T if transposed else weights, bias)

    return forward


def scale(layer: LayerSetup) -> Forward:
    layer.takes(1, 2)
    fields = layer.parameters("scale_param", "axis", "num_axes", "filler", "bias_term", "bias_filler")
    spread = _spread(layer, fields.axis, fields.num_axes)
    if len(layer.bottoms) == 1:
        layer.blob(fields.filler if fields.HasField("filler") else None, constant=1.0)
    if fields.bias_term:
        layer.blob(fields.bias_filler)
    shifts, start = fields.bias_term, layer.axis(fields.axis)

    def forward(blobs: Blobs, values: Tensor, *given: Tensor) -> Tensor:
        # A second bottom may hold one number for each image of a batch that is not that of the file.
        over = _spread_over(values, given[0], start) if given else spread
        values = values * (given[0] if given else blobs[0]).reshape(over)
        return values + blobs[-1].reshape(spread) if shifts else values

    return forward


def bias(layer: LayerSetup) -> Forward:
    layer.takes(1, 2)
    fields = layer.parameters("bias_param", "axis", "num_axes", "filler")
    spread = _spread(layer, fields.axis, fields.num_axes)
    if len(layer.bottoms) == 2:
        start = layer.axis(fields.axis)
        return lambda blobs, values, added: values + added.reshape(_spread_over(values, added, start))
    layer.blob(fields.filler)
    return lambda blobs, values: values + blobs[0].reshape(spread)


def _spread(layer: LayerSetup, axis: int, axes: int) -> Shape:
    """The shape of what a Bias or Scale applies, with 1s for the axes that it repeats along."""
    shape = layer.bottoms[0]
    start = layer.axis(axis)
    if len(layer.bottoms) == 2:
        size = layer.bottoms[1]
        if not size:
            return (1,) * len(shape)
    elif axes == 0:
        return (1,) * len(shape)
    else:
        size = shape[start:] if axes == -1 else shape[start : start + axes]
    end = start + len(size)
    if shape[start:end] != size or (len(layer.bottoms) == 1 and axes > 0 and len(size) != axes):
        layer.refuse(f"what it applies from axis {axis} on does not match its bottom's shape {shape}")
    return (1,) * start + size + (1,) * (len(shape) - end)


def _spread_over(values: Tensor, applied: Tensor, start: int) -> Shape:
    """The shape of ``applied`` from axis ``start`` of ``values`` on, with 1s for the others."""
    if not applied.dim():
        return (1,) * values.dim()
    return (1,) * start + tuple(applied.shape) + (1,) * (values.dim() - start - applied.dim())


def embed(layer: LayerSetup) -> Forward:
    """The row of weights that each number of the bottom names, and a bias."""
    layer.takes(1)
    fields = layer.parameters(
        "embed_param", "num_output", "input_dim", "bias_term", "weight_filler", "bias_filler"
    )
    if min(fields.num_output, fields.input_dim) < 1:
        layer.refuse("embed_param.num_output and input_dim have to be at least 1")
    layer.blob(fields.weight_filler)
    if fields.bias_term:
        layer.blob(fields.bias_filler)
    indices = layer.indices_of(0, "the index", fields.input_dim)

    def forward(blobs: Blobs, numbers: Tensor) -> Tensor:
        weights, bias = with_bias(blobs)
        rows = F.embedding(indices(numbers), weights)
        return rows if bias is None else rows + bias

    return forward


LAYERS: dict[str, Builder] = {
    "Bias": bias,
    "Embed": embed,
    "InnerProduct": inner_product,
    "Scale": scale,
}
