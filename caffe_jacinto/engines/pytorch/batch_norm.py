"""Batch normalization in both of its forms, and the recalibration of its statistics.

Stock Caffe: three blobs (mean, variance, factor). The first two are sums, weighted by the moving average
fraction and stored times the factor. A Scale layer follows. The fork: five blobs (mean, variance, an unused
factor, scale, shift). The first two are plain moving averages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from caffe_jacinto.engines.pytorch.layer_setup import Forward, LayerSetup
from caffe_jacinto.prototxt.dialects import FORK_MIN_EPS, Dialect
from caffe_jacinto.prototxt.solver import TEST

if TYPE_CHECKING:
    from caffe_jacinto.engines.pytorch.distributed import Ranks
    from caffe_jacinto.engines.pytorch.net import Net

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
        self.fork = fork
        self.fixed = fields.use_global_stats if fields.HasField("use_global_stats") else layer.phase == TEST
        self.fraction = fields.moving_average_fraction
        self.eps = max(fields.eps, FORK_MIN_EPS) if fork else fields.eps
        self.mean, self.variance = layer.statistic(), layer.statistic()
        self.factor = layer.statistic(1.0 if fork else 0.0)
        self.own: Affine | None = None
        if fork and fields.scale_bias:
            given = fields.scale_filler if fields.HasField("scale_filler") else None
            self.own = (layer.blob(given, constant=1.0), layer.blob(fields.bias_filler))
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


class Statistics:
    """The batch-norm statistics of a net in training; each rank has those of its own batches."""

    def __init__(self, net: Net, ranks: Ranks) -> None:
        self._ranks = ranks
        self._fork = net.dialect is Dialect.CAFFE_JACINTO
        norms = [layer for layer in net.layers if layer.type == "BatchNorm"]
        self._all = [blob.tensor for layer in norms for blob in net.layer_blobs[layer.name][:3]]
        moving = [layer for layer in norms if not layer.batch_norm_param.use_global_stats]
        self.layers = len(moving)
        """How many layers have statistics that move."""

        self._averages = [
            (blob.tensor, layer.batch_norm_param.moving_average_fraction)
            for layer in moving
            # The fork's third blob is a factor that stays.
            for blob in net.layer_blobs[layer.name][: 2 if self._fork else 3]
        ]

    def share(self) -> None:
        """Give all ranks those of the first."""
        self._ranks.copy_from_first(self._all)

    def recalibrate(self, batches: int, one_pass: Callable[[], object], stop: Callable[[], bool]) -> bool:
        """Set the statistics to averages over ``batches`` passes, which the ranks share out.

        ``one_pass`` is a pass of this rank in the train phase. False: ``stop`` requested an end.
        """
        passes = -(-batches // self._ranks.size)
        with torch.no_grad():
            # From zero, nothing of the old statistics goes into the new.
            for tensor, _ in self._averages:
                tensor.zero_()
            for _ in range(passes):
                if any(self._ranks.any(stop())):
                    return False
                one_pass()
            if self._fork:
                # Averages that began at zero; stock Caffe's are sums, with their weight in the third blob.
                for tensor, fraction in self._averages:
                    tensor /= 1 - fraction**passes
            self._ranks.average([tensor for tensor, _ in self._averages])
        return True

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put the statistics back, at the end, as they are now."""
        self.share()  # as every test does: with recalibration or without, ranks continue with the same ones
        own = [tensor.clone() for tensor, _ in self._averages]
        try:
            yield
        finally:
            for (tensor, _), values in zip(self._averages, own, strict=True):
                tensor.copy_(values)
