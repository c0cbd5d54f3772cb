"""Functions of each value alone, dropout and softmax."""

from __future__ import annotations

from caffe_jacinto.export.onnx.graph import Graph, Operator, by_channel, input_shape
from caffe_jacinto.export.stock_net import StockLayer
from caffe_jacinto.netspec.shapes import LayerShapes


def _power(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    parameters = layer.message.power_param
    steps = [
        ("Mul", "scale", parameters.scale, 1),
        ("Add", "shift", parameters.shift, 0),
        ("Pow", "power", parameters.power, 1),
    ]
    needed = [(kind, name, value) for kind, name, value, nothing in steps if value != nothing]
    if not needed:
        graph.node("Identity", bottoms, output)
    value = bottoms[0]
    for number, (kind, name, factor) in enumerate(needed, 1):
        given = output if number == len(needed) else graph.inner(output, name)
        graph.node(kind, [value, graph.number(layer, name, factor)], given)
        value = given


def _relu(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    slope = layer.message.relu_param.negative_slope
    if slope:
        graph.node("LeakyRelu", bottoms, output, alpha=slope)
    else:
        graph.node("Relu", bottoms, output)


def _prelu(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    slopes = by_channel(layer.blobs[0], len(input_shape(shaped)))
    graph.node("PRelu", [*bottoms, graph.constant(f"{layer.name}:slope", slopes)], output)


def _dropout(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    # Caffe scales in training, so there is nothing to do here.
    graph.node("Identity", bottoms, output)


def _softmax(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    axis = layer.message.softmax_param.axis % len(input_shape(shaped))
    graph.node("Softmax", bottoms, output, axis=axis)


OPERATORS: dict[str, Operator] = {
    "Dropout": _dropout,
    "PReLU": _prelu,
    "Power": _power,
    "ReLU": _relu,
    "Softmax": _softmax,
}
