"""The shapes and the cost of a whole network, layer by layer, for one crop (a batch of 1).

Multiply-accumulates (MACs) are those of convolutions and inner products; biases, normalization and pooling do
not count, as in the published tables. What the network does not determine is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from caffe_jacinto.netspec.graph import counted_convolutions, layers_in, nodes_of
from caffe_jacinto.netspec.layer_types import (
    DATA_PARAMETERS,
    LAYER_TYPES,
    Shape,
    blob_shapes_of,
    is_known,
    output_shapes,
    role_of,
)
from caffe_jacinto.netspec.layer_types.geometry import channel_axis
from caffe_jacinto.prototxt.tree import Message, tree_of

FullShape = tuple[int, ...]
DataShapes: TypeAlias = Sequence[FullShape] | Mapping[str, FullShape]
"""The shapes (batch, channels, height, width) of the blobs that data layers give, where they are known: those
of the Data, ImageData and WindowData layers in order, or those of any layers without inputs, by name."""

ImageShape = tuple[int, int, int]
"""Channels, height and width."""

_GIVEN = ("Data", "ImageData", "WindowData")
"""Data layers whose shape a log prints."""

_MOST_IN_A_BLOB = (1 << 31) - 1
"""Numbers in a blob of Caffe's, which counts them with an int (Blob::Reshape)."""

_MOST_MACS = 1 << 62
"""No network computes more; the text of a log may say anything."""


@dataclass(frozen=True)
class LayerShapes:
    """A layer with the shapes of the blobs around it and of its own."""

    layer: Message
    kind: str
    """Its type."""

    bottoms: list[FullShape | None]
    tops: list[FullShape | None]
    """None where not all of a shape is known."""

    blobs: list[Shape]


@dataclass(frozen=True)
class LayerCost:
    """What a convolution or inner product costs."""

    name: str
    type: str
    macs: int | None
    """Multiply-accumulates of one crop; None where the input's shape is not known."""

    weights: int | None
    """Weights, without biases."""

    outputs: int
    """Output channels: as many as there are biases."""

    counted: bool
    """Whether its zeros count as sparsity: see `graph.counted_convolutions`."""


def layer_shapes(net: Message, data_shapes: DataShapes = (), phase: str | None = None) -> list[LayerShapes]:
    """Every layer of ``net`` in ``phase`` (or its own), in order, with its shapes."""
    return [
        LayerShapes(layer, layer.string("type"), _full(bottoms), _full(tops), blobs)
        for layer, bottoms, tops, blobs in _walk(net, data_shapes, phase)
    ]


def blob_shapes(net: Any, phase: str, data_shapes: DataShapes = ()) -> dict[str, list[Shape]]:
    """The shapes of the blobs of each layer that has any, in ``phase``; ``net`` is a NetParameter message."""
    walked = _walk(tree_of(net), data_shapes, phase)
    return {layer.string("name"): blobs for layer, _, _, blobs in walked if blobs}


def layer_costs(net: Message, data_shapes: DataShapes = (), phase: str | None = None) -> list[LayerCost]:
    """The convolutions and inner products of ``net`` in order, with their cost; see `layer_shapes`."""
    shaped = layer_shapes(net, data_shapes, phase)
    counted = set(counted_convolutions(nodes_of(item.layer for item in shaped)))
    return [
        _cost(item, item.layer.string("name") in counted)
        for item in shaped
        if role_of(item.kind) in ("convolution", "inner product")
        or (item.layer.has("convolution_param") and item.kind not in LAYER_TYPES)
    ]


def gigamacs(net: Message, data_shapes: DataShapes = ()) -> float | None:
    """GigaMACs of one crop; None where the network does not determine them."""
    costs = layer_costs(net, data_shapes)
    known = [cost.macs for cost in costs if cost.macs is not None]
    return sum(known) / 1e9 if costs and len(known) == len(costs) else None


def image_shape(layer: Message, image_shapes: Mapping[str, ImageShape]) -> ImageShape | None:
    """The shape of the images that a Data layer gives; None without a crop or a known LMDB.

    ``image_shapes`` are the shapes of the images in LMDBs, by their paths.
    """
    data, transform = layer.message("data_param"), layer.message("transform_param")
    channels, height, width = image_shapes.get(data.string("source"), (3, 0, 0))
    grey = transform.flag("force_gray")
    if transform.flag("force_color") or data.flag("force_encoded_color") or grey:
        channels = 1 if grey else 3
    crop = transform.integer("crop_size")
    return (channels, crop or height, crop or width) if crop or height else None


def batch_size(net: Message) -> int | None:
    """Images of one pass: the batch of the first data layer; None where the network does not say."""
    for layer in layers_in(net):
        kind = layer.string("type")
        if kind in DATA_PARAMETERS:
            return layer.message(DATA_PARAMETERS[kind]).optional_integer("batch_size")
        if role_of(kind) == "data":
            found = output_shapes(layer, [], 1)[0]
            return found[0] if found else None
    return None


def emptied_layer(net: Message, side: int | None = None) -> str | None:
    """The first layer of which no output is left, if there is one.

    ``side`` replaces height and width of the network's declared inputs, in pixels.
    """
    for layer, _, tops, _ in _walk(net, (), None, side):
        if any(dim is not None and dim < 1 for shape in tops for dim in shape or ()):
            return layer.string("name")
    return None


_Walked = tuple[Message, list[Shape | None], list[Shape | None], list[Shape]]


def _walk(
    net: Message, data_shapes: DataShapes, phase: str | None, side: int | None = None
) -> Iterator[_Walked]:
    """Each layer with the shapes of its bottoms, tops and blobs, for a batch of 1."""
    shapes = _declared_inputs(net, side)
    by_name: Mapping[str, FullShape] = data_shapes if isinstance(data_shapes, Mapping) else {}
    given = iter(() if isinstance(data_shapes, Mapping) else data_shapes)
    for layer in layers_in(net, phase):
        kind = layer.string("type")
        bottoms = [shapes.get(name) for name in layer.strings("bottom")]
        names = layer.strings("top")
        tops = output_shapes(layer, bottoms, len(names))
        if role_of(kind) == "data":
            known = by_name.get(layer.string("name")) or (next(given, None) if kind in _GIVEN else None)
            tops = [_single(known or tops[0]), *map(_single, tops[1:])] if tops else []
        elif names and not bottoms and layer.string("name") in by_name:
            tops = [_single(by_name[layer.string("name")]), *tops[1:]]
        tops = [_possible(top) for top in tops]
        shapes.update(zip(names, tops, strict=True))
        yield layer, bottoms, tops, blob_shapes_of(layer, bottoms)


def _declared_inputs(net: Message, side: int | None) -> dict[str, Shape | None]:
    """Blobs of the old ``input:`` form."""
    names = net.strings("input")
    shapes: list[Sequence[int]] = [shape.integers("dim") for shape in net.messages("input_shape")]
    dims = net.integers("input_dim")
    shapes = shapes or [dims[start : start + 4] for start in range(0, len(dims), 4)]
    found = {name: _single(tuple(shape)) for name, shape in zip(names, shapes, strict=False)}
    if side is None:
        return found
    return {name: shape and (*shape[:2], *[side] * len(shape[2:])) for name, shape in found.items()}


def _single(shape: Shape | None) -> Shape | None:
    """The shape for a batch of 1; a dimension that is not positive is not known."""
    if not shape:
        return None
    return (1, *(dim if dim is None or dim > 0 else None for dim in shape[1:]))


def _possible(shape: Shape | None) -> Shape | None:
    """The shape, with None for a dimension that Caffe's blobs cannot have."""
    if shape is None or all(dim is None or dim <= _MOST_IN_A_BLOB for dim in shape):
        return shape
    return tuple(dim if dim is None or dim <= _MOST_IN_A_BLOB else None for dim in shape)


def _full(shapes: Sequence[Shape | None]) -> list[FullShape | None]:
    return [_whole(shape) for shape in shapes]


def _whole(shape: Shape | None) -> FullShape | None:
    if shape is None or any(dim is None or dim < 1 for dim in shape):
        return None
    return tuple(dim for dim in shape if dim is not None)


def _cost(item: LayerShapes, counted: bool) -> LayerCost:
    """The cost of a convolution or inner product; of another layer with a convolution in it, not known."""
    name = item.layer.string("name")
    inner_product = item.kind == "InnerProduct"
    parameter = item.layer.message("inner_product_param" if inner_product else "convolution_param")
    filters = parameter.integer("num_output")
    source = item.bottoms[0] if item.bottoms else None
    target = item.tops[0] if item.tops else None
    shape = item.blobs[0] if item.blobs else None
    if source is None or target is None or shape is None or not is_known(shape):
        return LayerCost(name, item.kind, None, None, filters, counted)
    weights = math.prod(dim for dim in shape if dim is not None)
    if inner_product:
        positions = math.prod(target[:-1])
    else:
        # Several bottoms share one set of weights, each with its own top.
        grid = source if item.kind == "Deconvolution" else target
        positions = math.prod(grid) // grid[channel_axis(item.layer, grid)] * len(item.bottoms)
    macs = weights * positions
    if macs > _MOST_MACS:
        return LayerCost(name, item.kind, None, None, filters, counted)
    return LayerCost(name, item.kind, macs, weights, filters, counted)
