"""Layers that join, cut and reshape blobs and leave the values as they are."""

from __future__ import annotations

from math import prod

import torch

from caffe_jacinto.engines.pytorch.layer_setup import Builder, Forward, LayerSetup
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
    result = layer.tops[0]
    # The batch may be smaller than in the file when the last one of a pass is.
    kept = start > 0
    return lambda blobs, values: values.reshape((values.shape[0], *result[1:]) if kept else result)


LAYERS: dict[str, Builder] = {
    "Concat": concat,
    "Flatten": flatten,
    "Reshape": reshape,
}
