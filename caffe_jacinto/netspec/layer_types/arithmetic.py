"""Layers that compute one value from several: across bottoms, or along axes."""

from __future__ import annotations

from caffe_jacinto.netspec.layer_types.base import LayerType, Shapes, axis_of, required, same
from caffe_jacinto.prototxt.tree import Message


def _reduction(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    shape = required(bottoms)
    return [shape[: axis_of(layer.message("reduction_param"), 0, shape)]]


def _arg_max(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """Without an axis, at least three axes: batch x 1 (place) or 2 (place and number) x top_k."""
    parameter = layer.message("argmax_param")
    shape, top_k = required(bottoms), parameter.integer("top_k", 1)
    if parameter.has("axis"):
        axis = axis_of(parameter, 0, shape)
        return [(*shape[:axis], top_k, *shape[axis + 1 :])]
    rows = 2 if parameter.flag("out_max_val") else 1
    return [(shape[0], rows, top_k, *[1] * (len(shape) - 3))]


TYPES: dict[str, LayerType] = {
    "ArgMax": LayerType(_arg_max),
    "Eltwise": LayerType(same),
    "Reduction": LayerType(_reduction),
}
