"""Layers that forks of Caffe added; see netspec/layer_types/forks.py."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from caffe_jacinto.engines.pytorch.layer_setup import Blobs, Builder, Forward, LayerSetup
from caffe_jacinto.engines.pytorch.layers.convolution import convolution
from caffe_jacinto.netspec.layer_types.forks import (
    gives_its_size,
    keeps_averages,
    permuted_axes,
    upsampling,
)
from caffe_jacinto.prototxt.forks import DEPTHWISE
from caffe_jacinto.prototxt.solver import TEST

_SEGNET_EPS = 1e-9
"""What SegNet's BN adds to the variance; it has no field for it."""


def depthwise(layer: LayerSetup) -> Forward:
    """A convolution with as many groups as channels."""
    layer.takes(1)
    channels = layer.bottoms[0][1] if len(layer.bottoms[0]) > 1 else 1
    fields = layer.message.convolution_param
    if fields.num_output != channels or fields.group not in (1, channels):
        layer.refuse(
            f"has one filter for each of the {channels} channels: convolution_param.num_output"
            f" {fields.num_output} has to be {channels}, and group {fields.group} that number or left out"
        )
    message = type(layer.message)()
    message.CopyFrom(layer.message)
    message.convolution_param.group = channels
    return convolution(replace(layer, message=message))


def bn(layer: LayerSetup) -> Forward:
    """SegNet's batch norm, of this batch or (INFERENCE) none; or the one with moving averages."""
    layer.takes(1)
    (shape,) = layer.bottoms
    if len(shape) != 4:
        layer.refuse("normalizes batch x channels x height x width only")
    if keeps_averages(layer.tree):
        return _bn_with_averages(layer)
    fields = layer.parameters("bn_param", "scale_filler", "shift_filler", "bn_mode")
    if not fields.ListFields():
        layer.refuse(
            "its bn_param is empty, and two forks have this type: set bn_mode (SegNet and ENet: two blobs),"
            " or eps (PSPNet: four blobs)"
        )
    # Without fillers, Caffe's default of 0 would leave nothing; weights replace either.
    layer.blob(fields.scale_filler if fields.HasField("scale_filler") else None, constant=1.0)
    layer.blob(fields.shift_filler)
    if fields.bn_mode == type(fields).INFERENCE:
        return lambda blobs, images: images * blobs[0] + blobs[1]
    return lambda blobs, images: _normalized(images, blobs[0], blobs[1], _SEGNET_EPS)


def _bn_with_averages(layer: LayerSetup) -> Forward:
    """The blobs are scale, shift, and the averages of mean and (biased) variance."""
    fields = layer.parameters("bn_param", "slope_filler", "bias_filler", "momentum", "eps", "frozen")
    momentum, eps, frozen = fields.momentum, fields.eps, fields.frozen
    if not 0 <= momentum < 1:
        layer.refuse(f"bn_param.momentum {momentum:g} has to be from 0 to below 1")
    layer.blob(fields.slope_filler if fields.HasField("slope_filler") else None, constant=1.0)
    layer.blob(fields.bias_filler)
    layer.statistic()
    layer.statistic(1.0 if frozen else 0.0)
    if frozen:
        for blob in layer.blobs[:2]:
            blob.lr_mult = blob.decay_mult = 0.0
            blob.tensor.requires_grad_(False)
    if frozen or layer.phase == TEST:
        return lambda blobs, images: (images - blobs[2]) * (blobs[3] + eps).rsqrt() * blobs[0] + blobs[1]

    def forward(blobs: Blobs, images: Tensor) -> Tensor:
        with torch.no_grad():
            variance, mean = torch.var_mean(images.float(), (0, 2, 3), correction=0, keepdim=True)
            blobs[2].mul_(momentum).add_(mean, alpha=1 - momentum)
            blobs[3].mul_(momentum).add_(variance, alpha=1 - momentum)
        return _normalized(images, blobs[0], blobs[1], eps)

    return forward


def _normalized(images: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """``images`` less their batch's mean, over its deviation, times ``scale``, plus ``shift``."""
    if images.numel() == images.shape[1]:  # one value a channel is its own mean, which PyTorch refuses
        return images * 0 * scale + shift
    return F.batch_norm(images, None, None, scale.reshape(-1), shift.reshape(-1), True, 0.0, eps)


def normalize(layer: LayerSetup) -> Forward:
    """Each image (or each of its pixels) over its length, and by a learned scale."""
    layer.takes(1)
    fields = layer.parameters("norm_param", "across_spatial", "scale_filler", "channel_shared", "eps")
    (shape,) = layer.bottoms
    if len(shape) < 2:
        layer.refuse("needs a bottom with channels")
    layer.blob(fields.scale_filler if fields.HasField("scale_filler") else None, constant=1.0)
    axes = tuple(range(1, len(shape))) if fields.across_spatial else (1,)
    spread = (1,) if fields.channel_shared else (-1,) + (1,) * (len(shape) - 2)
    eps = fields.eps

    def forward(blobs: Blobs, values: Tensor) -> Tensor:
        length = values.float().square().sum(axes, keepdim=True).add(eps).sqrt()
        return values / length * blobs[0].reshape(spread)

    return forward


def relu6(layer: LayerSetup) -> Forward:
    layer.takes(1)
    layer.only()
    return lambda blobs, values: F.relu6(values)


def permute(layer: LayerSetup) -> Forward:
    layer.takes(1)
    named = list(layer.parameters("permute_param", "order").order)
    axes = len(layer.bottoms[0])
    if len(set(named)) < len(named) or max(named, default=0) >= axes:
        layer.refuse(f"permute_param.order {named} has to name axes from 0 to {axes - 1}, each once at most")
    order = permuted_axes(layer.tree, axes)
    return lambda blobs, values: values.permute(order)


def shuffle_channel(layer: LayerSetup) -> Forward:
    """Channel i of group g becomes channel g of group i."""
    layer.takes(1)
    group = layer.parameters("shuffle_channel_param", "group").group
    (shape,) = layer.bottoms
    channels = shape[1] if len(shape) > 1 else 1
    if len(shape) < 2 or group < 1 or channels % group:
        layer.refuse(f"shuffle_channel_param.group {group} does not divide the channels of {shape}")

    def forward(blobs: Blobs, values: Tensor) -> Tensor:
        rest = values.shape[2:]
        return (
            values.reshape(-1, group, channels // group, *rest).transpose(1, 2).reshape(-1, channels, *rest)
        )

    return forward


def axpy(layer: LayerSetup) -> Forward:
    """a x + y, with one a for each channel of each image."""
    layer.takes(3)
    layer.only()
    factors, images, added = layer.bottoms
    axes = len(images)
    if axes < 2 or factors[:2] != images[:2] or any(dim != 1 for dim in factors[2:]) or images != added:
        layer.refuse(
            f"its bottoms are {factors}, {images} and {added}: the first has to be the batch and channels of"
            " the second, and the third like the second"
        )
    spread = (-1, images[1]) + (1,) * (axes - 2)
    return lambda blobs, a, x, y: a.reshape(spread) * x + y


def interp(layer: LayerSetup) -> Forward:
    """Bilinear, with the corners in place; padding below zero cuts the image first.

    With a second bottom, to the height and width of that, whose values play no part, unless the settings give
    the size.
    """
    layer.takes(1, 2)
    fields = layer.parameters(
        "interp_param", "height", "width", "zoom_factor", "shrink_factor", "pad_beg", "pad_end"
    )
    shape = layer.bottoms[0]
    from_second = len(layer.bottoms) == 2 and not gives_its_size(layer.tree)
    if from_second and len(layer.bottoms[1]) != 4:
        layer.refuse(f"its second bottom {layer.bottoms[1]} has no height and width")
    before, behind = fields.pad_beg, fields.pad_end
    if len(shape) != 4 or max(before, behind) > 0 or min(shape[2:]) + before + behind < 1:
        layer.refuse("takes images of four axes, and padding that is 0 or cuts off a part of them")
    if min(fields.zoom_factor, fields.shrink_factor) < 1 or min(layer.tops[0]) < 1:
        layer.refuse(
            f"its output of {layer.tops[0]} is empty: give zoom_factor or shrink_factor (at least 1), or"
            " height and width"
        )
    size = layer.tops[0][2:]
    rows, columns = (slice(-before, dim + behind) for dim in shape[2:])
    return lambda blobs, values, *_: F.interpolate(
        values[:, :, rows, columns], size, mode="bilinear", align_corners=True
    )


def upsample(layer: LayerSetup) -> Forward:
    """Each pixel several times; or, with a second bottom, to the place that it came from in max pooling."""
    layer.takes(1, 2)
    fields = layer.parameters(
        "upsample_param",
        *("scale", "scale_h", "scale_w", "pad_out_h", "pad_out_w", "upsample_h", "upsample_w"),
    )
    shape, settings = layer.bottoms[0], upsampling(layer.tree)
    if len(shape) != 4 or min(settings.scale) < 1 or min(layer.tops[0]) < 1:
        layer.refuse(f"scales images of four axes up, by at least 1; its output would be {layer.tops[0]}")
    if len(layer.bottoms) == 2:
        if layer.bottoms[1] != shape:
            layer.refuse(f"its second bottom {layer.bottoms[1]} is not a place for each of {shape}")
        return _unpooled(layer)
    if settings.size is not None or fields.pad_out_h or fields.pad_out_w:
        layer.refuse("upsample_h, upsample_w and padding go with a second bottom, the mask of a max pooling")
    down, across = settings.scale
    return lambda blobs, values: values.repeat_interleave(down, 2).repeat_interleave(across, 3)


def _unpooled(layer: LayerSetup) -> Forward:
    height, width = layer.tops[0][2:]
    what = f"its output has {height}x{width} pixels (upsample_h, upsample_w), without the place"
    places = layer.indices_of(1, what, height * width)

    def forward(blobs: Blobs, values: Tensor, mask: Tensor) -> Tensor:
        flat = values.new_zeros(*values.shape[:2], height * width)
        filled = flat.scatter(2, places(mask).flatten(2), values.flatten(2))
        return filled.view(*flat.shape[:2], height, width)

    return forward


LAYERS: dict[str, Builder] = {
    **dict.fromkeys(DEPTHWISE, depthwise),
    "Axpy": axpy,
    "BN": bn,
    "Interp": interp,
    "Normalize": normalize,
    "Permute": permute,
    "ReLU6": relu6,
    "ShuffleChannel": shuffle_channel,
    "Upsample": upsample,
}
