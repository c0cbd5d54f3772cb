"""Pooling over windows of the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from caffe_jacinto.engines.pytorch.layer_setup import Blobs, Builder, Forward, LayerSetup
from caffe_jacinto.netspec.layer_types.pooling import rounds_down
from caffe_jacinto.prototxt.solver import TRAIN

Pool = Callable[[Tensor], Tensor]
"""From images to what is left of them."""


@dataclass(frozen=True)
class Windows:
    """Where the windows of a pooling lie; each pair is of height and width."""

    size: tuple[int, ...]
    """Pixels of the image."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]
    pooled: tuple[int, ...]
    """The number of windows."""

    @property
    def margins(self) -> list[int]:
        """The padding that makes the windows fill the image exactly, as F.pad takes it; negative: cut off."""
        found: list[int] = []
        for i in (1, 0):
            before = self.pad[i]
            last = (self.pooled[i] - 1) * self.stride[i] + self.kernel[i]
            found += [before, last - self.size[i] - before]
        return found

    @property
    def areas(self) -> Tensor:
        """What each window's sum is divided by: its pixels, those of the padding too, but none beyond it."""
        spans = []
        for i in (0, 1):
            starts = torch.arange(self.pooled[i]) * self.stride[i] - self.pad[i]
            spans.append((starts + self.kernel[i]).clamp(max=self.size[i] + self.pad[i]) - starts)
        return spans[0][:, None] * spans[1][None, :]


def pooling(layer: LayerSetup) -> Forward:
    """The largest number, the mean, or one that is drawn; a second top of MAX has the largest's places."""
    layer.takes(1, tops=2)
    fields = layer.parameters(
        "pooling_param",
        *("pool", "pad", "pad_h", "pad_w", "kernel_size", "kernel_h", "kernel_w"),
        *("stride", "stride_h", "stride_w", "global_pooling", "round_mode", "ceil_mode"),
    )
    (shape,) = layer.bottoms
    if len(shape) != 4:
        layer.refuse("pools batch x channels x height x width only")
    method = str(type(fields).PoolMethod.Name(fields.pool))
    masked = len(layer.message.top) == 2
    if masked and method != "MAX":
        layer.refuse("only MAX has a second top, the mask")
    size = shape[2:]
    kernel, stride, pad, _ = layer.geometry()
    if fields.global_pooling:
        if method == "AVE":
            return lambda blobs, images: images.mean((2, 3), keepdim=True)
        if method == "MAX" and not masked:
            return lambda blobs, images: F.max_pool2d(images, size)
        windows, up = Windows(size, size, (1, 1), (0, 0), (1, 1)), False
    else:
        windows = Windows(size, kernel, stride, pad, layer.tops[0][2:])
        up = not rounds_down(layer.tree.message("pooling_param"))
        if min(windows.pooled) < 1 or any(
            (windows.pooled[i] - 1) * stride[i] >= size[i] + pad[i] for i in (0, 1)
        ):
            layer.refuse(
                f"a window of {kernel[0]}x{kernel[1]} lies outside of the {size[0]}x{size[1]} pixels; "
                "use a smaller stride or kernel"
            )
    if masked:
        return _with_places(windows)
    pool = _pool(layer, method, windows, up)
    return lambda blobs, images: pool(images)


def _pool(layer: LayerSetup, method: str, windows: Windows, up: bool) -> Pool:
    """``up``: whether the number of windows is rounded up, as PyTorch can do itself."""
    if method == "STOCHASTIC":
        return _stochastic(layer, windows)
    largest = method == "MAX"
    kernel, stride, pad = windows.kernel, windows.stride, windows.pad
    # On a GPU, PyTorch divides a window over the edge by another number.
    by_pytorch = largest or layer.device.type == "cpu"
    if up and 2 * pad[0] <= kernel[0] and 2 * pad[1] <= kernel[1] and by_pytorch:
        if largest:
            return lambda images: F.max_pool2d(images, kernel, stride, pad, ceil_mode=True)
        return lambda images: F.avg_pool2d(images, kernel, stride, pad, ceil_mode=True)
    margins = windows.margins
    if largest:
        return lambda images: F.max_pool2d(F.pad(images, margins, value=float("-inf")), kernel, stride)
    areas = windows.areas.to(layer.device)

    def average(images: Tensor) -> Tensor:
        sums = F.avg_pool2d(F.pad(images, margins), kernel, stride, divisor_override=1)
        return sums / areas.to(sums.dtype)

    return average


def _with_places(windows: Windows) -> Forward:
    """The largest numbers, and for each its place in the plane of its channel: row x width + column."""
    margins, width, pad = windows.margins, windows.size[1], windows.pad
    padded_width = width + margins[0] + margins[1]

    def forward(blobs: Blobs, images: Tensor) -> tuple[Tensor, Tensor]:
        padded = F.pad(images, margins, value=float("-inf"))
        values, places = F.max_pool2d(padded, windows.kernel, windows.stride, return_indices=True)
        rows, columns = places // padded_width - pad[0], places % padded_width - pad[1]
        # In bfloat16, places from 256 on would not be exact.
        return values, (rows * width + columns).float()

    return forward


def _stochastic(layer: LayerSetup, windows: Windows) -> Pool:
    """In training one number of each window, drawn with a probability in proportion to it (Zeiler and Fergus
    2013); in tests their mean, weighted by themselves. As in Caffe's CUDA code: it has none for CPUs.
    """
    if any(windows.pad):
        layer.refuse("STOCHASTIC pooling has no padding; remove pad")
    layer.draws = trains = layer.phase == TRAIN
    margins, last = windows.margins, prod(windows.kernel) - 1

    def forward(images: Tensor) -> Tensor:
        rows = F.pad(images.float(), margins).unfold(2, windows.kernel[0], windows.stride[0])
        parts = rows.unfold(3, windows.kernel[1], windows.stride[1]).flatten(4)
        if not trains:
            return parts.square().sum(-1) / (parts.sum(-1) + torch.finfo(torch.float32).tiny)
        sums = parts.detach().cumsum(-1)
        limits = torch.rand_like(sums[..., :1]) * sums[..., -1:]
        drawn = (sums < limits).sum(-1, keepdim=True).clamp(max=last)
        return parts.gather(-1, drawn)[..., 0]

    return forward


def pyramid(layer: LayerSetup) -> Forward:
    """SPP, spatial pyramid pooling (He et al. 2014): 1, 2x2, 4x4 ... windows over the image, in one row.

    One level alone is that pooling, as it is.
    """
    layer.takes(1)
    fields = layer.parameters("spp_param", "pyramid_height", "pool")
    (shape,) = layer.bottoms
    if len(shape) != 4 or fields.pyramid_height < 1:
        layer.refuse(
            "pools batch x channels x height x width only, with a spp_param.pyramid_height of at least 1"
        )
    method, size = str(type(fields).PoolMethod.Name(fields.pool)), shape[2:]
    pools = []
    for level in range(fields.pyramid_height):
        bins = 2**level
        kernel = tuple(-(-side // bins) for side in size)
        pad = tuple((step * bins - side + 1) // 2 for step, side in zip(kernel, size, strict=True))
        if pad[0] >= kernel[0] or pad[1] >= kernel[1]:
            layer.refuse(
                f"{size[0]}x{size[1]} pixels cannot be cut into {bins}x{bins} windows; "
                "use a smaller pyramid_height"
            )
        pools.append(_pool(layer, method, Windows(size, kernel, kernel, pad, (bins, bins)), True))
    if len(pools) == 1:
        return lambda blobs, images: pools[0](images)
    return lambda blobs, images: torch.cat([pool(images).flatten(1) for pool in pools], 1)


LAYERS: dict[str, Builder] = {
    "Pooling": pooling,
    "SPP": pyramid,
}
