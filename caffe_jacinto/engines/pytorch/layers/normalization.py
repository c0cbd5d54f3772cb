"""Layers that normalize their input: BatchNorm, LRN, MVN."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from caffe_jacinto.engines.pytorch.batch_norm import batch_norm
from caffe_jacinto.engines.pytorch.layer_setup import Blobs, Builder, Forward, LayerSetup


def lrn(layer: LayerSetup) -> Forward:
    """Across channels, or within each: y = x / (k + alpha/n x the sum of n squares) ^ beta."""
    layer.takes(1)
    fields = layer.parameters("lrn_param", "local_size", "alpha", "beta", "k", "norm_region")
    size, alpha, beta = fields.local_size, fields.alpha, fields.beta
    if size % 2 == 0:
        layer.refuse(f"lrn_param.local_size {size} has to be odd")
    half = (size - 1) // 2
    (shape,) = layer.bottoms
    if len(shape) != 4:
        layer.refuse("normalizes batch x channels x height x width only")
    if fields.norm_region == type(fields).WITHIN_CHANNEL:
        # Caffe builds this of its pooling and power layers, and so passes over k: it is 1.
        def within(blobs: Blobs, values: Tensor) -> Tensor:
            squares = F.avg_pool2d(values.float().square(), size, 1, half)
            return values * torch.pow(1 + alpha * squares, -beta)

        return within
    channels = shape[1]

    def across(blobs: Blobs, values: Tensor) -> Tensor:
        squares = F.pad(values.float().square(), (0, 0, 0, 0, half, half))
        total = squares[:, :channels]
        for offset in range(1, size):
            total = total + squares[:, offset : offset + channels]
        return values * torch.pow(total * (alpha / size) + fields.k, -beta)

    return across


def mean_variance(layer: LayerSetup) -> Forward:
    """MVN: x less its mean, and over its deviation + eps, for each item and channel, or each item."""
    layer.takes(1)
    fields = layer.parameters("mvn_param", "normalize_variance", "across_channels", "eps")
    (shape,) = layer.bottoms
    if not 2 <= len(shape) <= 4:
        layer.refuse(f"normalizes blobs of two to four axes, and has {shape}")
    first, eps, scales = 1 if fields.across_channels else 2, fields.eps, fields.normalize_variance

    def forward(blobs: Blobs, values: Tensor) -> Tensor:
        rows = values.float().reshape(*values.shape[:first], -1)
        result = _MeanVariance.apply(rows, eps) if scales else rows - rows.mean(-1, keepdim=True)
        return result.reshape(*values.shape, *[1] * (4 - len(shape)))

    return forward


class _MeanVariance(torch.autograd.Function):
    """The last axis normalized. The gradient is Caffe's: as if eps were 0 but where it divides."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, eps: float) -> Tensor:
        centred = rows - rows.mean(-1, keepdim=True)
        divisor = centred.square().mean(-1, keepdim=True).sqrt() + eps
        result = centred / divisor
        ctx.save_for_backward(result, divisor)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        result, divisor = ctx.saved_tensors
        along = result * (gradient * result).mean(-1, keepdim=True)
        return (gradient - gradient.mean(-1, keepdim=True) - along) / divisor, None


LAYERS: dict[str, Builder] = {
    "BatchNorm": batch_norm,
    "LRN": lrn,
    "MVN": mean_variance,
}
