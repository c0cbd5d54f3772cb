"""Layers that run as one: a convolution, its batch norm, Scale, ReLU and pooling.

One pass over the images instead of one for each layer: most of such a network's time goes into moving them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import util
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from caffe_jacinto.engines.pytorch import cpu_kernels
from caffe_jacinto.engines.pytorch.batch_norm import Normalization, NormSettings
from caffe_jacinto.engines.pytorch.convolutions import Convolution
from caffe_jacinto.engines.pytorch.layer_setup import Blobs, Forward, LayerSetup
from caffe_jacinto.engines.pytorch.layers import LAYERS
from caffe_jacinto.engines.pytorch.layers.convolution import convolution_of, with_bias
from caffe_jacinto.prototxt.dialects import Dialect

FusedForward = Callable[..., Tensor]
"""From the blobs of each layer, and then the bottom of the first, to the top of the last."""

_NEXT = {
    "Convolution": ("BatchNorm",),
    "BatchNorm": ("Scale", "ReLU"),
    "Scale": ("ReLU",),
    "ReLU": ("Pooling",),
}
"""Which layers can follow which in a chain."""

_ONLY_WITH_KERNELS = ("Convolution", "Pooling")

_OLDEST = (7, 0)
"""Compute capability of NVIDIA's GPUs from which on Triton supports them."""


def chain_from(layers: Sequence[Any], at: int, device: torch.device, dialect: Dialect) -> Sequence[Any]:
    """The layers from number ``at`` on that run as one on ``device``; none where that layer runs alone."""
    left_out = () if has_kernels(device) else _ONLY_WITH_KERNELS
    first = layers[at]
    if first.type not in ("Convolution", "BatchNorm") or first.type in left_out:
        return ()
    if first.loss_weight or first.propagate_down:
        return ()
    chain = [first]
    for number, layer in enumerate(layers[at + 1 :], start=at + 1):
        follows = layer.type in _NEXT.get(chain[-1].type, ()) and layer.type not in left_out
        if not follows or not _continues(layers, number) or not _fits(layer, chain, dialect):
            break
        chain.append(layer)
    return chain if len(chain) > 1 else ()


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels of gpu_kernels.py or cpu_kernels.py run on ``device``."""
    if device.type == "cpu":
        return cpu_kernels.why_not() is None
    if device.type != "cuda" or util.find_spec("triton") is None:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= _OLDEST


def _continues(layers: Sequence[Any], number: int) -> bool:
    """Whether layer ``number`` reads the top of the layer before it, and nothing else reads that."""
    layer, before = layers[number], layers[number - 1]
    if list(layer.bottom) != list(before.top) or len(layer.top) != 1:
        return False
    if layer.propagate_down or layer.loss_weight:
        return False
    (name,) = before.top
    for other in () if name in layer.top else layers[number + 1 :]:
        if name in other.bottom:
            return False
        if name in other.top:
            break
    return True


def _fits(layer: Any, chain: Sequence[Any], dialect: Dialect) -> bool:
    """Whether the settings of ``layer`` are those that can be computed together with the ``chain``."""
    if layer.type == "Scale":
        own = dialect is Dialect.CAFFE_JACINTO and chain[-1].batch_norm_param.scale_bias
        return not own and layer.scale_param.axis == 1 and layer.scale_param.num_axes == 1
    if layer.type == "ReLU":
        return not layer.relu_param.negative_slope
    if layer.type == "Pooling":
        fields = layer.pooling_param
        square = (fields.kernel_size, fields.stride, fields.pad) == (2, 2, 0)
        others = (fields.kernel_h, fields.kernel_w, fields.stride_h, fields.stride_w)
        plain = not any((*others, fields.pad_h, fields.pad_w, fields.global_pooling))
        return bool(square and plain and fields.pool == type(fields).MAX)
    return True


class Fusion:
    """Builds the layers of one chain, in order, and then the function for all of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._at: dict[str, int] = {}
        self._normalize: Normalization | None = None
        self._convolve: Convolution | None = None
        self._pool: Forward | None = None

    def add(self, layer: LayerSetup) -> Forward:
        """Build the next layer of the chain; returns what it computes alone.

        Raises:
            UserError: a field that is not supported.
        """
        kind = layer.message.type
        self._at[kind] = len(self._at)
        if kind == "BatchNorm":
            self._normalize = normalize = Normalization(layer)
            return lambda blobs, images: normalize(blobs, images)
        if kind == "Convolution":
            self._convolve = convolve = convolution_of(layer)
            return lambda blobs, images: convolve(images, *with_bias(blobs))
        function = LAYERS[kind](layer)
        if kind == "Pooling":
            self._pool = function
        return function

    def function(self) -> FusedForward:
        """What the whole chain computes."""
        normalize, convolve, pool, at = self._normalize, self._convolve, self._pool, self._at
        assert normalize is not None
        rectify, kernels = "ReLU" in at, has_kernels(self._device) and not normalize.fixed

        def forward(blobs: Sequence[Blobs], images: Tensor) -> Tensor:
            norm, behind = blobs[at["BatchNorm"]], blobs[at["Scale"]] if "Scale" in at else ()
            bias = None
            if convolve is not None:
                weights, bias = with_bias(blobs[at["Convolution"]])
                images = convolve(images, weights, None if kernels else bias)
            halves = pool is not None and images.shape[2] % 2 == images.shape[3] % 2 == 0
            if kernels and images.dim() == 4 and images.numel() > images.shape[1] and _takes(images):
                result = _by_kernels(normalize, norm, behind, images, bias, rectify, halves)
                return result if pool is None or halves else _alone(pool, result)
            if kernels and bias is not None:
                images = images + bias.to(images.dtype)[:, None, None]
            result = normalize(norm, images, behind)
            # In place: a batch norm's gradient needs its input and not its output.
            result = F.relu_(result) if rectify else result
            return result if pool is None else _alone(pool, result)

        return forward


def _alone(pool: Forward, images: Tensor) -> Tensor:
    result = pool((), images)
    assert isinstance(result, Tensor)
    return result


def _takes(images: Tensor) -> bool:
    return images.is_cuda or cpu_kernels.takes(images)


def _by_kernels(
    normalize: Normalization,
    norm: Blobs,
    behind: Blobs,
    images: Tensor,
    bias: Tensor | None,
    rectify: bool,
    pool: bool,
) -> Tensor:
    """``bias`` is the convolution's, which was not added: it shifts the mean and changes nothing else."""
    scale, shift = normalize.affine(norm, behind)
    settings = NormSettings(normalize.eps, normalize.fraction, normalize.fork, rectify, pool)
    images = images.contiguous(memory_format=torch.channels_last)
    if images.is_cuda:
        from caffe_jacinto.engines.pytorch.gpu_kernels import NormRectifyPool

        moving = (norm[0], norm[1], norm[2])
        result: Tensor = NormRectifyPool.apply(images, scale, shift, bias, moving, settings)
        return result
    moments = norm[0].new_empty((2, images.shape[1]))
    result = cpu_kernels.NormRectifyPool.apply(images, scale, shift, bias, moments, settings)
    normalize.remember(norm, moments[0], moments[1])
    return result
