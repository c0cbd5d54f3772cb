"""Layers that normalize their input."""

from __future__ import annotations

from caffe_jacinto.netspec.layer_types.base import LayerType, Shape, Shapes, channels_of, required, same
from caffe_jacinto.prototxt.tree import Message


def _batch_norm_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    channels: Shape = (channels_of(bottoms),)
    statistics: list[Shape] = [channels, channels, (1,)]
    fork = layer.message("batch_norm_param").flag("scale_bias")
    return [*statistics, channels, channels] if fork else statistics


def _four_axes(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """MVN's top has four axes, whatever its bottom has."""
    shape = required(bottoms)
    return [(*shape, *[1] * (4 - len(shape)))]


TYPES: dict[str, LayerType] = {
    "BatchNorm": LayerType(
        same, _batch_norm_blobs, ("mean", "variance", "factor", "scale", "bias"), "follower"
    ),
    "LRN": LayerType(same, role="follower"),
    "MVN": LayerType(_four_axes),
}
