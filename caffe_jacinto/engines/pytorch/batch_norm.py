"""Batch normalisation in both of its forms.

Stock Caffe: three blobs (mean, variance, factor); the first two are sums, weighted by the moving average
fraction and stored times the factor. A Scale layer follows. The fork: five blobs (mean, variance, a factor
that nothing reads, scale, shift); the first two are plain moving averages.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor

from caffe_jacinto.engines.pytorch.layer_setup import TEST, Forward, LayerSetup
from caffe_jacinto.prototxt.dialects import Dialect

FORK_MIN_EPS = 1e-5
"""CUDNN_BN_MIN_EPSILON: the fork takes no less."""

Affine = tuple[Tensor, Tensor | None]
"""Scale and shift of each channel."""


def batch_norm(layer: LayerSetup) -> Forward:
    """The layer alone; see `fused_batch_norm` for one with the Scale layer behind it."""
    normalize = fused_batch_norm(layer)
    return lambda images: normalize(images, None)


class fused_batch_norm:  # noqa: N801 - called like the builders
    """A batch norm that scales and shifts in the same pass over the images.

    Called with the images (batch x channels, or batch x channels x height x width) and the scale and shift of
    a Scale layer, or None.
    """

    def __init__(self, layer: LayerSetup) -> None:
        layer.takes(1)
        fork = layer.dialect is Dialect.CAFFE_JACINTO
        known = ["use_global_stats", "moving_average_fraction", "eps"]
        known += ["scale_bias", "scale_filler", "bias_filler"] if fork else []
        fields = layer.parameters("batch_norm_param", *known)
        (shape,) = layer.bottoms
        channels = (shape[1] if len(shape) > 1 else 1,)
        self.fork = fork
        self.fixed = fields.use_global_stats if fields.HasField("use_global_stats") else layer.phase == TEST
        self.fraction = fields.moving_average_fraction
        self.eps = max(fields.eps, FORK_MIN_EPS) if fork else fields.eps
        self.mean, self.variance = layer.statistic(channels), layer.statistic(channels)
        self.factor = layer.statistic((1,), 1.0 if fork else 0.0)
        self.own: Affine | None = None
        if fork and fields.scale_bias:
            given = fields.scale_filler if fields.HasField("scale_filler") else None
            self.own = (layer.blob(channels, given, constant=1.0), layer.blob(channels, fields.bias_filler))
        # The statistics of one batch, as PyTorch leaves them in its "running" ones with a momentum of 1.
        self._batch = (torch.zeros_like(self.mean), torch.zeros_like(self.mean))

    def __call__(self, images: Tensor, affine: Affine | None) -> Tensor:
        scale, shift = affine or self.own or (None, None)
        if self.fixed:
            mean, variance = self.averages()
            return F.batch_norm(images, mean, variance, scale, shift, False, 0.0, self.eps)
        if images.numel() == images.shape[1]:
            return self._one_value_a_channel(images, scale, shift)
        result = F.batch_norm(images, *self._batch, scale, shift, True, 1.0, self.eps)
        self._remember(*self._batch)
        return result

    def averages(self) -> tuple[Tensor, Tensor]:
        """Mean and variance to normalize with when testing."""
        if self.fork:
            return self.mean, self.variance
        divided = torch.where(self.factor == 0, 0.0, 1 / self.factor)
        return self.mean * divided, self.variance * divided

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Take a batch's mean and (unbiased) variance into the moving averages."""
        with torch.no_grad():
            share = 1 - self.fraction if self.fork else 1.0
            self.mean.mul_(self.fraction).add_(mean, alpha=share)
            self.variance.mul_(self.fraction).add_(variance, alpha=share)
            if not self.fork:
                self.factor.mul_(self.fraction).add_(1)

    def _one_value_a_channel(self, images: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        """A batch whose channels are one pixel each: they are their own means, which PyTorch refuses."""
        flat = images.detach().float().reshape(-1)
        self._remember(flat, torch.zeros_like(flat))
        spread = (1, -1) + (1,) * (images.dim() - 2)
        result = images * 0
        if scale is not None:
            result = result * scale.reshape(spread)
        return result if shift is None else result + shift.reshape(spread)
