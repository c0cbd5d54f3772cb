"""Pooling over windows of the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from caffe_jacinto.engines.pytorch.layer_setup import Blobs, Builder, Forward, LayerSetup
from caffe_jacinto.netspec.layer_types import geometry
from caffe_jacinto.netspec.layer_types.pooling import rounds_down


def pooling(layer: LayerSetup) -> Forward:
    layer.takes(1, tops=2)
    fields = layer.parameters(
        "pooling_param",
        *("pool", "pad", "pad_h", "pad_w", "kernel_size", "kernel_h", "kernel_w"),
        *("stride", "stride_h", "stride_w", "global_pooling", "round_mode", "ceil_mode"),
    )
    (shape,) = layer.bottoms
    if len(shape) != 4:
        layer.refuse("pools batch x channels x height x width only")
    kinds = type(fields)
    if fields.pool not in (kinds.MAX, kinds.AVE):
        layer.refuse("pooling_param.pool: only MAX and AVE are supported")
    largest = fields.pool == kinds.MAX
    if len(layer.message.top) == 2:
        if not largest:
            layer.refuse("only MAX has a second top, the mask")
        return _with_mask(layer, bool(fields.global_pooling))
    if fields.global_pooling:
        size = shape[2:]
        if largest:
            return lambda blobs, images: F.max_pool2d(images, size)
        return lambda blobs, images: images.mean((2, 3), keepdim=True)
    kernel, stride, pad, _ = geometry(layer.tree)
    if min(*kernel, *stride) < 1 or pad[0] >= kernel[0] or pad[1] >= kernel[1]:
        layer.refuse("kernel and stride have to be at least 1, and pad smaller than the kernel")
    up = not rounds_down(layer.tree.message("pooling_param"))
    sizes = layer.tops[0][2:]
    if any((sizes[i] - 1) * stride[i] >= shape[i + 2] + pad[i] for i in (0, 1)) or min(sizes) < 1:
        layer.refuse(
            f"a window of {kernel[0]}x{kernel[1]} lies outside of the {shape[2]}x{shape[3]} pixels; "
            "use a smaller stride or kernel"
        )
    # On a GPU, PyTorch divides a window over the edge by another number.
    by_pytorch = largest or layer.device.type == "cpu"
    if up and 2 * pad[0] <= kernel[0] and 2 * pad[1] <= kernel[1] and by_pytorch:
        if largest:
            return lambda blobs, images: F.max_pool2d(images, kernel, stride, pad, ceil_mode=True)
        return lambda blobs, images: F.avg_pool2d(images, kernel, stride, pad, ceil_mode=True)
    edges = tuple(
        _edges(shape[i + 2], kernel[i], stride[i], pad[i], sizes[i]) for i in (1, 0)
    )  # width first, as F.pad has it
    margins = [*edges[0], *edges[1]]
    if largest:
        return lambda blobs, images: F.max_pool2d(F.pad(images, margins, value=float("-inf")), kernel, stride)
    areas = _areas(shape[2:], kernel, stride, pad, sizes).to(layer.device)

    def average(blobs: Blobs, images: Tensor) -> Tensor:
        sums = F.avg_pool2d(F.pad(images, margins), kernel, stride, divisor_override=1)
        return sums / areas.to(sums.dtype)

    return average


def _with_mask(layer: LayerSetup, whole: bool) -> Forward:
    """Max pooling whose second top has each value's place in the plane of its channel, as a number."""
    _, _, *size = layer.bottoms[0]
    kernel, stride, pad, _ = geometry(layer.tree)
    if whole:
        kernel, stride, pad = tuple(size), tuple(size), (0, 0)
    if any(2 * before > extent for before, extent in zip(pad, kernel, strict=True)):
        layer.refuse("with a mask, pad has to be at most half of the kernel")
    up = not rounds_down(layer.tree.message("pooling_param"))

    def forward(blobs: Blobs, images: Tensor) -> tuple[Tensor, Tensor]:
        values, places = F.max_pool2d(images, kernel, stride, pad, ceil_mode=up, return_indices=True)
        return values, places.float()  # in bfloat16, places from 256 on would not be exact

    return forward


def _edges(size: int, kernel: int, stride: int, pad: int, pooled: int) -> tuple[int, int]:
    """The padding before and behind that makes the windows fill an axis exactly; negative: cut off."""
    return pad, (pooled - 1) * stride + kernel - size - pad


def _areas(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pad: tuple[int, ...],
    pooled: tuple[int, ...],
) -> Tensor:
    """What each window's sum is divided by: its pixels, those of the padding too, but none beyond it."""
    spans = []
    for i in (0, 1):
        starts = torch.arange(pooled[i]) * stride[i] - pad[i]
        spans.append((starts + kernel[i]).clamp(max=size[i] + pad[i]) - starts)
    return spans[0][:, None] * spans[1][None, :]


LAYERS: dict[str, Builder] = {
    "Pooling": pooling,
}
