"""Layers that compute one value from several: across bottoms, or along axes."""

from __future__ import annotations

from collections.abc import Callable

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


LAYERS: dict[str, Builder] = {
    "Eltwise": eltwise,
}
