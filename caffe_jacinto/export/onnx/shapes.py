"""Layers that join, cut and reshape blobs and leave the values as they are."""

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
    import numpy as np

    shape = shaped.tops[0] or ()
    if shape[0] != 1:  # the shapes are those of a batch of one
        graph.refuse(layer, "first axis", "it has to be the batch")
    target = graph.constant(f"{layer.name}:shape", np.array([0, *shape[1:]], np.int64))
    graph.node("Reshape", [*bottoms, target], output)


OPERATORS: dict[str, Operator] = {
    "Concat": _concat,
    "Flatten": _reshape,
    "Reshape": _reshape,
}
