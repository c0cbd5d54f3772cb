"""Pooling over windows of the image."""

from __future__ import annotations

from caffe_jacinto.netspec.layer_types.base import Dim, LayerType, Shapes, image, product
from caffe_jacinto.netspec.layer_types.geometry import geometry
from caffe_jacinto.prototxt.tree import Message


def rounds_down(parameter: Message) -> bool:
    """Whether ``pooling_param`` rounds sizes down: by stock Caffe's field, or by the one of forks."""
    return parameter.string("round_mode") == "FLOOR" or not parameter.flag("ceil_mode", True)


def _pooling(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """Caffe rounds the size up, and with padding drops a last window that begins outside the image."""
    first = image(bottoms)
    parameter = layer.message("pooling_param")
    if parameter.flag("global_pooling"):
        return [(*first[:2], *[1] * (len(first) - 2))] * tops
    kernel, stride, pad, _ = geometry(layer)
    down = rounds_down(parameter)
    sizes: list[Dim] = []
    for axis, size in enumerate(first[2:]):
        if size is None:
            sizes.append(None)
            continue
        room = size + 2 * pad[axis] - kernel[axis]
        pooled = (room // stride[axis] if down else -(-room // stride[axis])) + 1
        if any(pad) and (pooled - 1) * stride[axis] >= size + pad[axis]:
            pooled -= 1
        sizes.append(pooled)
    return [(*first[:2], *sizes)] * tops


def _pyramid(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """One row: of each channel 1 number, then 4, 16 ...; of one level the pooling alone."""
    first, height = image(bottoms), layer.message("spp_param").integer("pyramid_height")
    if height == 1:
        return [(*first[:2], 1, 1)]
    return [(first[0], product((first[1], sum(4**level for level in range(min(height, _MOST_LEVELS))))))]


_MOST_LEVELS = 16
"""More give no blob that Caffe can hold."""


TYPES: dict[str, LayerType] = {
    "SPP": LayerType(_pyramid),
    "Pooling": LayerType(_pooling, role="pooling"),
}
