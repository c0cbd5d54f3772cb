"""Layers that compute one value from several: across bottoms, or along axes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from caffe_jacinto.engines.pytorch.layer_setup import Blobs, Builder, Forward, LayerSetup


def eltwise(layer: LayerSetup) -> Forward:
    layer.takes(2, len(layer.bottoms))
    fields = layer.parameters("eltwise_param", "operation", "coeff", "stable_prod_grad")
    if len(set(layer.bottoms)) > 1:
        layer.refuse(f"its bottoms have different shapes: {', '.join(map(str, layer.bottoms))}")
    kinds = type(fields)
    factors = list(fields.coeff)
    if factors and (len(factors) != len(layer.bottoms) or fields.operation != kinds.SUM):
        layer.refuse("eltwise_param.coeff goes with SUM, one for each bottom")
    if fields.operation == kinds.SUM:
        return _weighted_sum(factors)
    combine = torch.mul if fields.operation == kinds.PROD else torch.maximum
    return lambda blobs, first, *others: _folded(combine, first, others)


def _weighted_sum(factors: list[float]) -> Forward:
    def forward(blobs: Blobs, *values: Tensor) -> Tensor:
        if not factors or all(factor == 1 for factor in factors):
            return _folded(torch.add, values[0], values[1:])
        terms = [value * factor for value, factor in zip(values, factors, strict=True)]
        return _folded(torch.add, terms[0], tuple(terms[1:]))

    return forward


def _folded(combine: Callable[[Tensor, Tensor], Tensor], first: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    for other in others:
        first = combine(first, other)
    return first


def reduction(layer: LayerSetup) -> Forward:
    """The sum, the sum of magnitudes or of squares, or the mean from an axis on, times ``coeff``."""
    layer.takes(1)
    fields = layer.parameters("reduction_param", "operation", "axis", "coeff")
    axes = tuple(range(layer.axis(fields.axis), len(layer.bottoms[0])))
    kinds, operation, factor = type(fields), fields.operation, fields.coeff

    def forward(blobs: Blobs, values: Tensor) -> Tensor:
        values = values.float()
        if operation == kinds.MEAN:
            return values.mean(axes) * factor
        if operation == kinds.ASUM:
            values = values.abs()
        elif operation == kinds.SUMSQ:
            values = values.square()
        return values.sum(axes) * factor

    return forward


def arg_max(layer: LayerSetup) -> Forward:
    """Where the ``top_k`` largest numbers are, and with ``out_max_val`` how large; no gradient passes.

    Along an axis this is either the place or the number. Without one it is among all of an item's numbers,
    and gives batch x 1 x top_k places, or batch x 2 x top_k places and numbers. Of equal numbers the last
    comes first.
    """
    layer.takes(1)
    fields = layer.parameters("argmax_param", "out_max_val", "top_k", "axis")
    (shape,) = layer.bottoms
    axis = layer.axis(fields.axis) if fields.HasField("axis") else None
    top_k, numbers = fields.top_k, fields.out_max_val
    candidates = prod(shape[1:]) if axis is None else shape[axis]
    if not 1 <= top_k <= candidates:
        layer.refuse(
            f"argmax_param.top_k {top_k} of {candidates} numbers; it has to be from 1 to {candidates}"
        )
    rest = layer.tops[0][1:]

    def forward(blobs: Blobs, values: Tensor) -> Tensor:
        values = values.detach().float()
        rows = values.reshape(len(values), -1) if axis is None else values.movedim(axis, -1)
        found = rows.flip(-1).sort(dim=-1, descending=True, stable=True)
        largest, places = found.values[..., :top_k], (candidates - 1 - found.indices[..., :top_k]).float()
        if axis is not None:
            return (largest if numbers else places).movedim(-1, axis)
        return torch.stack([places, largest] if numbers else [places], 1).reshape(-1, *rest)

    return forward


LAYERS: dict[str, Builder] = {
    "ArgMax": arg_max,
    "Eltwise": eltwise,
    "Reduction": reduction,
}
