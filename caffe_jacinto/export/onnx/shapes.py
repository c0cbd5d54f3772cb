"""Layers that join, cut, repeat and reshape blobs and leave the values as they are."""

from __future__ import annotations

from caffe_jacinto.export.onnx.graph import Graph, Operator, input_shape
from caffe_jacinto.export.stock_net import StockLayer
from caffe_jacinto.netspec.shapes import LayerShapes


def _concat(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    parameters = layer.message.concat_param
    axis = parameters.concat_dim if parameters.HasField("concat_dim") else parameters.axis
    axis %= len(input_shape(shaped))
    if axis == 0:
        graph.refuse(layer, "concat_param.axis", "the size of the batch is not fixed")
    graph.node("Concat", bottoms, output, axis=axis)


def _reshape(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    """Flatten and Reshape: the output's shape is known but for the batch."""
    shape = shaped.tops[0] or ()
    if shape[0] != 1:  # the shapes are those of a batch of one
        graph.refuse(layer, "first axis", "it has to be the batch")
    target = graph.integers(layer, "shape", [0, *shape[1:]])
    graph.node("Reshape", [*bottoms, target], output)


def _slice(
    graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], outputs: list[str]
) -> None:
    parameters = layer.message.slice_param
    axis = parameters.slice_dim if parameters.HasField("slice_dim") else parameters.axis
    axis %= len(input_shape(shaped))
    if axis == 0:
        graph.refuse(layer, "slice_param.axis", "the size of the batch is not fixed")
    sizes = [(shape or ())[axis] for shape in shaped.tops]
    graph.node("Split", [*bottoms, graph.integers(layer, "sizes", sizes)], outputs, axis=axis)


def _split(
    graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], outputs: list[str]
) -> None:
    for output in outputs:
        graph.node("Identity", bottoms, output)


def _silence(
    graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], outputs: list[str]
) -> None:
    """No node: its inputs have been read, and so are not outputs of the model."""


def _tile(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    shape, parameters = input_shape(shaped), layer.message.tile_param
    axis = parameters.axis % len(shape)
    if axis == 0:
        graph.refuse(layer, "tile_param.axis", "the size of the batch is not fixed")
    repeats = [parameters.tiles if at == axis else 1 for at in range(len(shape))]
    graph.node("Tile", [*bottoms, graph.integers(layer, "repeats", repeats)], output)


def _crop(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    shape, parameters = input_shape(shaped), layer.message.crop_param
    axes = range(parameters.axis % len(shape), len(shape))
    if 0 in axes:
        graph.refuse(layer, "crop_param.axis", "the size of the batch is not fixed")
    starts = list(parameters.offset) or [0]
    starts = starts * len(axes) if len(starts) == 1 else starts
    if len(starts) != len(axes):
        graph.refuse(layer, "crop_param.offset", f"one value, or one for each of {len(axes)} axes")
    ends = [start + (shaped.tops[0] or ())[at] for at, start in zip(axes, starts, strict=True)]
    if any(end > shape[at] for at, end in zip(axes, ends, strict=True)):
        graph.refuse(layer, "crop_param.offset", "the part reaches beyond the input")
    names = [
        graph.integers(layer, name, list(values))
        for name, values in (("starts", starts), ("ends", ends), ("axes", axes))
    ]
    graph.node("Slice", [bottoms[0], *names], output)


OPERATORS: dict[str, Operator] = {
    "Concat": _concat,
    "Crop": _crop,
    "Flatten": _reshape,
    "Reshape": _reshape,
    "Silence": _silence,
    "Slice": _slice,
    "Split": _split,
    "Tile": _tile,
}
