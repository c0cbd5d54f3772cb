"""Batch normalization in both of its forms, and the recalibration of its statistics.

Stock Caffe: three blobs (mean, variance, factor). The first two are sums, weighted by the moving average
fraction and stored times the factor. A Scale layer follows. The fork: five blobs (mean, variance, an unused
factor, scale, shift). The first two are plain moving averages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from caffe_jacinto.engines.pytorch.layer_setup import Blobs, Forward, LayerSetup
from caffe_jacinto.netspec.layer_types.forks import keeps_averages
from caffe_jacinto.prototxt.dialects import FORK_MIN_EPS, Dialect
from caffe_jacinto.prototxt.solver import TEST
from caffe_jacinto.prototxt.tree import tree_of

if TYPE_CHECKING:
    from caffe_jacinto.engines.pytorch.distributed import Ranks
    from caffe_jacinto.engines.pytorch.net import Net


class NormSettings(NamedTuple):
    """What a batch norm in training and the layers that run with it do."""

    eps: float
    fraction: float
    """Of the moving average that stays at each update."""

    fork: bool
    """The statistics are plain averages (caffe-jacinto), not sums (stock Caffe)."""

    rectify: bool
    pool: bool
    """2x2 max pooling with stride 2; the images have even sides."""


def batch_norm(layer: LayerSetup) -> Forward:
    """The layer alone; see `Normalization` for one with the layers behind it."""
    normalize = Normalization(layer)
    return lambda blobs, images: normalize(blobs, images)


class Normalization:
    """A batch norm's settings, and what it computes with the layers directly behind it."""

    def __init__(self, layer: LayerSetup) -> None:
        """Read the settings and make the blobs of the BatchNorm ``layer``."""
        layer.takes(1)
        fork = layer.dialect is Dialect.CAFFE_JACINTO
        known = ["use_global_stats", "moving_average_fraction", "eps"]
        known += ["scale_bias", "scale_filler", "bias_filler"] if fork else []
        fields = layer.parameters("batch_norm_param", *known)
        self.fork = fork
        self.fixed = fields.use_global_stats if fields.HasField("use_global_stats") else layer.phase == TEST
        self.fraction = fields.moving_average_fraction
        self.eps = max(fields.eps, FORK_MIN_EPS) if fork else fields.eps
        self.scales = bool(fork and fields.scale_bias)
        """Whether it scales and shifts by blobs of its own."""

        layer.statistic()
        layer.statistic()
        layer.statistic(1.0 if fork else 0.0)
        if self.scales:
            given = fields.scale_filler if fields.HasField("scale_filler") else None
            layer.blob(given, constant=1.0)
            layer.blob(fields.bias_filler)

    def affine(self, blobs: Blobs, behind: Blobs = ()) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift of each channel, or None: its own, or those of the Scale layer ``behind`` it."""
        if self.scales:
            return blobs[3], blobs[4]
        return (behind[0] if behind else None), (behind[1] if len(behind) > 1 else None)

    def __call__(self, blobs: Blobs, images: Tensor, behind: Blobs = ()) -> Tensor:
        """``images`` (batch x channels, or batch x channels x height x width), normalized.

        ``blobs`` are the layer's own, ``behind`` those of a Scale layer that runs in the same pass.
        """
        scale, shift = self.affine(blobs, behind)
        if self.fixed:
            mean, variance = self.averages(blobs)
            return F.batch_norm(images, mean, variance, scale, shift, False, 0.0, self.eps)
        if images.numel() == images.shape[1]:
            return self._one_value_a_channel(blobs, images, scale, shift)
        # With a momentum of 1, PyTorch's "running" statistics are those of this batch.
        mean, variance = torch.zeros_like(blobs[0]), torch.zeros_like(blobs[1])
        result = F.batch_norm(images, mean, variance, scale, shift, True, 1.0, self.eps)
        self.remember(blobs, mean, variance)
        return result

    def averages(self, blobs: Blobs) -> tuple[Tensor, Tensor]:
        """Mean and variance to normalize with when testing."""
        mean, variance, factor = blobs[:3]
        if self.fork:
            return mean, variance
        divided = torch.where(factor == 0, 0.0, 1 / factor)
        return mean * divided, variance * divided

    def remember(self, blobs: Blobs, mean: Tensor, variance: Tensor) -> None:
        """Take a batch's mean and (unbiased) variance into the moving averages."""
        with torch.no_grad():
            share = 1 - self.fraction if self.fork else 1.0
            blobs[0].mul_(self.fraction).add_(mean, alpha=share)
            blobs[1].mul_(self.fraction).add_(variance, alpha=share)
            if not self.fork:
                blobs[2].mul_(self.fraction).add_(1)

    def _one_value_a_channel(
        self, blobs: Blobs, images: Tensor, scale: Tensor | None, shift: Tensor | None
    ) -> Tensor:
        """A batch whose channels are one pixel each: they are their own means, which PyTorch refuses."""
        flat = images.detach().float().reshape(-1)
        self.remember(blobs, flat, torch.zeros_like(flat))
        spread = (1, -1) + (1,) * (images.dim() - 2)
        result = images * 0
        if scale is not None:
            result = result * scale.reshape(spread)
        return result if shift is None else result + shift.reshape(spread)


class Statistics:
    """The batch-norm statistics of a net in training; each rank has those of its own batches."""

    def __init__(self, net: Net, ranks: Ranks, kept: str = "mean") -> None:
        """``kept`` says which ones tests and snapshots use: the ranks' "mean", or those of the "first"."""
        self._ranks, self._kept = ranks, kept
        self._fork = net.dialect is Dialect.CAFFE_JACINTO
        moving = [layer for layer in net.layers if self._moves(layer)]
        self.layers = len(moving)
        """How many layers have statistics that move."""

        self._averages = [pair for layer in moving for pair in self._averages_of(layer, net)]
        norms = {"BatchNorm": slice(3), "BN": slice(2, None)}
        self._all = [
            blob.tensor
            for layer in net.layers
            if layer.type in norms
            for blob in net.layer_blobs[layer.name][norms[layer.type]]
        ]

    def _moves(self, layer: Any) -> bool:
        if layer.type == "BN":
            return keeps_averages(tree_of(layer)) and not layer.bn_param.frozen
        return layer.type == "BatchNorm" and not layer.batch_norm_param.use_global_stats

    def _averages_of(self, layer: Any, net: Net) -> list[tuple[Tensor, float, bool]]:
        """Each statistic of a layer that moves, its fraction, and whether it is a plain average.

        Stock Caffe's are sums, with their weight in the third blob; the fork's third blob is a factor that
        stays.
        """
        blobs = [blob.tensor for blob in net.layer_blobs[layer.name]]
        if layer.type == "BN":
            return [(tensor, layer.bn_param.momentum, True) for tensor in blobs[2:]]
        fraction = layer.batch_norm_param.moving_average_fraction
        return [(tensor, fraction, self._fork) for tensor in blobs[: 2 if self._fork else 3]]

    def share(self) -> None:
        """Give all ranks the same ones: those that tests and snapshots use.

        Stock Caffe's are sums with their weight beside them; the mean of both over the ranks is that of all
        batches.
        """
        if self._kept == "mean":
            self._ranks.average([tensor for tensor, _, _ in self._averages])
        else:
            self._ranks.copy_from_first(self._all)

    def recalibrate(self, batches: int, one_pass: Callable[[], object], stop: Callable[[], bool]) -> bool:
        """Set the statistics to averages over ``batches`` passes, which the ranks share out.

        ``one_pass`` is a pass of this rank in the train phase. False: ``stop`` requested an end.
        """
        passes = -(-batches // self._ranks.size)
        with torch.no_grad():
            # From zero, nothing of the old statistics goes into the new.
            for tensor, _, _ in self._averages:
                tensor.zero_()
            for _ in range(passes):
                if any(self._ranks.any(stop())):
                    return False
                one_pass()
            for tensor, fraction, plain in self._averages:
                if plain:  # an average that began at zero
                    tensor /= 1 - fraction**passes
            self._ranks.average([tensor for tensor, _, _ in self._averages])
        return True

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put the statistics back, at the end, as they are now."""
        self.share()  # as every test does: with recalibration or without, ranks continue with the same ones
        own = [tensor.clone() for tensor, _, _ in self._averages]
        try:
            yield
        finally:
            for (tensor, _, _), values in zip(self._averages, own, strict=True):
                tensor.copy_(values)
