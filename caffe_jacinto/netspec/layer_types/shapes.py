"""Layers that join, cut, repeat and reshape blobs and leave the values as they are."""

from __future__ import annotations

from itertools import pairwise

from caffe_jacinto.netspec.layer_types.base import (
    Dim,
    LayerType,
    Shapes,
    axis_of,
    first_of,
    product,
    required,
)
from caffe_jacinto.prototxt.tree import Message


def _concat(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    parameter = layer.message("concat_param")
    known = [shape for shape in bottoms if shape is not None]
    if len(known) != len(bottoms):
        return [None]
    axis = parameter.integer("axis", parameter.integer("concat_dim", 1)) % len(known[0])
    sizes = [shape[axis] for shape in known]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    return [(*known[0][:axis], total, *known[0][axis + 1 :])]


def _slice(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    parameter = layer.message("slice_param")
    shape = required(bottoms)
    axis = parameter.integer("axis", parameter.integer("slice_dim", 1)) % len(shape)
    size, points = shape[axis], parameter.integers("slice_point")
    if size is None:
        return [None] * tops
    edges = [0, *(points or [size // tops * number for number in range(1, tops)]), size]
    return [(*shape[:axis], end - start, *shape[axis + 1 :]) for start, end in pairwise(edges)]


def _flatten(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    parameter = layer.message("flatten_param")
    shape = required(bottoms)
    axis, end = axis_of(parameter, 1, shape), parameter.integer("end_axis", -1) % len(shape)
    return [(*shape[:axis], product(shape[axis : end + 1]), *shape[end + 1 :])]


def _reshape(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    parameter = layer.message("reshape_param")
    shape = required(bottoms)
    start = parameter.integer("axis")
    start += len(shape) + 1 if start < 0 else 0
    count = parameter.integer("num_axes", -1)
    end = len(shape) if count == -1 else start + count
    dims = parameter.message("shape").integers("dim")
    out: list[Dim] = [
        *shape[:start],
        *(shape[start + axis] if dim == 0 else dim for axis, dim in enumerate(dims)),
        *shape[end:],
    ]
    total, rest = product(shape), product([dim for dim in out if dim != -1])
    if out.count(-1) == 1:
        out[out.index(-1)] = None if total is None or not rest else total // rest
    if total is not None and None not in out and product(out) != total:
        return [None]
    return [tuple(out)]


def _crop(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    first, second = required(bottoms), required(bottoms[1:])
    axis = layer.message("crop_param").integer("axis", 2) % len(first)
    return [(*first[:axis], *second[axis:])]


def _split(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    return [first_of(bottoms)] * tops


def _tile(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    parameter = layer.message("tile_param")
    shape = required(bottoms)
    axis = axis_of(parameter, 1, shape)
    size = shape[axis]
    tiled = None if size is None else size * parameter.integer("tiles")
    return [(*shape[:axis], tiled, *shape[axis + 1 :])]


def _batch_reindex(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    return [(*required(bottoms[1:])[:1], *required(bottoms)[1:])]


def _filter(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """Which items are left is only known in a pass: the most that can be."""
    return bottoms[:tops]


def _silence(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    return []


TYPES: dict[str, LayerType] = {
    "BatchReindex": LayerType(_batch_reindex),
    "Filter": LayerType(_filter),
    "Silence": LayerType(_silence),
    "Tile": LayerType(_tile),
    "Concat": LayerType(_concat),
    "Slice": LayerType(_slice),
    "Flatten": LayerType(_flatten),
    "Reshape": LayerType(_reshape),
    "Crop": LayerType(_crop),
    "Split": LayerType(_split),
}
