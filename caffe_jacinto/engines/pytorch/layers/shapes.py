"""Layers that join, cut, repeat and reshape blobs and leave the values as they are."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from caffe_jacinto.engines.pytorch.layer_setup import Blobs, Builder, Forward, LayerSetup
from caffe_jacinto.netspec.layer_types import is_known, output_shapes


def concat(layer: LayerSetup) -> Forward:
    layer.takes(1, max(len(layer.bottoms), 1))
    fields = layer.parameters("concat_param", "axis", "concat_dim")
    axis = fields.concat_dim if fields.HasField("concat_dim") else layer.axis(fields.axis)
    rests = {(*shape[:axis], *shape[axis + 1 :]) for shape in layer.bottoms}
    if len(rests) > 1 or axis >= len(layer.bottoms[0]):
        layer.refuse(f"its bottoms differ in more than axis {axis}: {', '.join(map(str, layer.bottoms))}")
    return lambda blobs, *values: torch.cat(values, axis)


def flatten(layer: LayerSetup) -> Forward:
    layer.takes(1)
    fields = layer.parameters("flatten_param", "axis", "end_axis")
    start, end = layer.axis(fields.axis), layer.axis(fields.end_axis)
    if end < start:
        layer.refuse("flatten_param.end_axis lies before axis")
    return lambda blobs, values: values.flatten(start, end)


def reshape(layer: LayerSetup) -> Forward:
    layer.takes(1)
    fields = layer.parameters("reshape_param", "shape", "axis", "num_axes")
    (shape,) = layer.bottoms
    axes = len(shape)
    start = fields.axis if fields.axis >= 0 else axes + fields.axis + 1
    end = axes if fields.num_axes == -1 else start + fields.num_axes
    if not 0 <= start <= end <= axes:
        layer.refuse(f"reshape_param.axis {fields.axis} and num_axes {fields.num_axes} leave the {axes} axes")
    if not is_known(output_shapes(layer.tree, layer.bottoms, 1)[0]) or min(layer.tops[0], default=1) < 1:
        given, values = list(fields.shape.dim), shape[start:end]
        layer.refuse(f"reshape_param.shape {given} does not hold the {prod(values)} values of {values}")
    dims = list(fields.shape.dim)

    def forward(blobs: Blobs, values: Tensor) -> Tensor:
        # The batch may be another than in the file: 0 copies it, and -1 follows from it.
        middle = (dim or values.shape[start + at] for at, dim in enumerate(dims))
        return values.reshape((*values.shape[:start], *middle, *values.shape[end:]))

    return forward


def cut(layer: LayerSetup) -> Forward:
    """Slice: the parts of an axis, between the slice points, or of equal size."""
    count = len(layer.message.top)
    layer.takes(1, tops=max(count, 1))
    fields = layer.parameters("slice_param", "axis", "slice_point", "slice_dim")
    axis = layer.axis(fields.slice_dim if fields.HasField("slice_dim") else fields.axis)
    points, size = list(fields.slice_point), layer.bottoms[0][axis]
    if points:
        if len(points) != count - 1 or [0, *points, size] != sorted({0, *points, size}):
            layer.refuse(
                f"slice_param.slice_point {points} of {size}: give {count - 1}, each above the one before"
            )
        return lambda blobs, values: values.tensor_split(points, axis)
    if size % count:
        layer.refuse(
            f"the {size} of axis {axis} are not divisible by {count} tops; give slice_param.slice_point"
        )
    return lambda blobs, values: values.tensor_split(count, axis)


def split(layer: LayerSetup) -> Forward:
    """The same for every top; the gradients are added."""
    count = len(layer.message.top)
    layer.takes(1, tops=max(count, 1))
    layer.only()
    return lambda blobs, values: (values,) * count


def silence(layer: LayerSetup) -> Forward:
    """Reads blobs so that they are not outputs of the net."""
    layer.takes(1, max(len(layer.bottoms), 1), tops=0)
    layer.only()
    return lambda blobs, *values: ()


def tile(layer: LayerSetup) -> Forward:
    """The bottom, ``tiles`` times along an axis."""
    layer.takes(1)
    fields = layer.parameters("tile_param", "axis", "tiles")
    axis, tiles = layer.axis(fields.axis), fields.tiles
    if tiles < 1:
        layer.refuse(f"tile_param.tiles {tiles} has to be at least 1")
    return lambda blobs, values: torch.cat([values] * tiles, axis)


def crop(layer: LayerSetup) -> Forward:
    """The part of the first bottom, from an offset on, that has the size of the second, from an axis on."""
    layer.takes(2)
    fields = layer.parameters("crop_param", "axis", "offset")
    axis, offsets = layer.axis(fields.axis), list(fields.offset)
    whole, wanted = layer.bottoms
    axes = range(axis, len(whole))
    if len(offsets) not in (0, 1, len(axes)):
        layer.refuse(
            f"crop_param.offset has {len(offsets)} values; give one, or one for each of {len(axes)} axes"
        )
    if len(offsets) <= 1:
        offsets = (offsets or [0]) * len(axes)
    if len(wanted) < len(whole) or any(
        start + wanted[at] > whole[at] for at, start in zip(axes, offsets, strict=True)
    ):
        layer.refuse(f"{whole} has no part of {wanted} from axis {axis} on at the offset {offsets}")

    def forward(blobs: Blobs, values: Tensor, reference: Tensor) -> Tensor:
        for at, start in zip(axes, offsets, strict=True):
            values = values.narrow(at, start, reference.shape[at])
        return values

    return forward


def batch_reindex(layer: LayerSetup) -> Forward:
    """The items of the first bottom by their numbers in the second."""
    layer.takes(2)
    layer.only()
    if len(layer.bottoms[1]) != 1:
        layer.refuse(f"its second bottom holds numbers of items, along one axis, and has {layer.bottoms[1]}")
    indices = layer.indices_of(1, "the number of an item", layer.bottoms[0][0])
    return lambda blobs, values, numbers: values.index_select(0, indices(numbers))


def select(layer: LayerSetup) -> Forward:
    """Filter: of each bottom but the last, the items where the last is not 0."""
    count = len(layer.bottoms) - 1
    layer.takes(2, max(count + 1, 2), tops=max(count, 1))
    layer.only()
    chosen = layer.bottoms[-1]
    if len(layer.message.top) != count or {shape[:1] for shape in layer.bottoms} != {chosen[:1]}:
        layer.refuse("needs a top for each bottom but the last, and as many items in each bottom")
    if prod(chosen) != chosen[0]:
        layer.refuse(f"its last bottom holds one number for each item, and has {chosen}")
    layer.recordable = False

    def forward(blobs: Blobs, *values: Tensor) -> tuple[Tensor, ...]:
        keep = values[-1].detach().reshape(-1) != 0
        return tuple(value[keep] for value in values[:-1])

    return forward


LAYERS: dict[str, Builder] = {
    "BatchReindex": batch_reindex,
    "Concat": concat,
    "Crop": crop,
    "Filter": select,
    "Flatten": flatten,
    "Reshape": reshape,
    "Silence": silence,
    "Slice": cut,
    "Split": split,
    "Tile": tile,
}
