"""Layers that multiply by weights or add them: inner products, Embed, Scale, Bias."""

from __future__ import annotations

from caffe_jacinto.netspec.layer_types.base import (
    WEIGHTS,
    LayerType,
    Shape,
    Shapes,
    axis_of,
    first_of,
    product,
    required,
    same,
    with_bias,
)
from caffe_jacinto.prototxt.tree import Message


def _inner_product(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    parameter = layer.message("inner_product_param")
    first = first_of(bottoms) or (None, None)
    return [(*first[: axis_of(parameter, 1, first)], parameter.integer("num_output"))] * tops


def _inner_product_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    parameter = layer.message("inner_product_param")
    first = first_of(bottoms)
    inputs = None if first is None else product(first[axis_of(parameter, 1, first) :])
    weights: Shape = (parameter.integer("num_output"), inputs)
    return with_bias(parameter, weights[::-1] if parameter.flag("transpose") else weights)


def _scale_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    parameter = layer.message("scale_param")
    bias = parameter.flag("bias_term")
    if len(bottoms) == 2:
        return [(None,) if bottoms[1] is None else bottoms[1]] if bias else []
    return [_from_axis(parameter, bottoms)] * (2 if bias else 1)


def _bias_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    return [_from_axis(layer.message("bias_param"), bottoms)] if len(bottoms) == 1 else []


def _from_axis(parameter: Message, bottoms: Shapes) -> Shape:
    """The axes that a Scale or Bias has numbers of its own for."""
    first, count = first_of(bottoms), parameter.integer("num_axes", 1)
    if count == 0:
        return ()
    if first is None:
        return (None,)
    start = axis_of(parameter, 1, first)
    return first[start:] if count == -1 else first[start : start + count]


def _embed(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    return [(*required(bottoms), layer.message("embed_param").integer("num_output"))]


def _embed_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    parameter = layer.message("embed_param")
    return with_bias(parameter, (parameter.integer("input_dim"), parameter.integer("num_output")))


TYPES: dict[str, LayerType] = {
    "Embed": LayerType(_embed, _embed_blobs, WEIGHTS),
    "InnerProduct": LayerType(_inner_product, _inner_product_blobs, WEIGHTS, "inner product"),
    "Scale": LayerType(same, _scale_blobs, ("scale", "bias"), "follower"),
    "Bias": LayerType(same, _bias_blobs, ("bias",), "follower"),
}
