"""Functions of each value alone, dropout and softmax."""

from __future__ import annotations

from math import log

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


def _one(kind: str) -> Operator:
    """A layer without settings: one node."""

    def add(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
        graph.node(kind, bottoms, output)

    return add


def _elu(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    graph.node("Elu", bottoms, output, alpha=layer.message.elu_param.alpha)


def _exp(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    parameters = layer.message.exp_param
    of_base = _logarithm(graph, layer, parameters.base, "exp_param.base")
    value = _affine(graph, layer, bottoms[0], output, of_base * parameters.scale, of_base * parameters.shift)
    graph.node("Exp", [value], output)


def _log(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    parameters = layer.message.log_param
    of_base = _logarithm(graph, layer, parameters.base, "log_param.base")
    value = _affine(graph, layer, bottoms[0], output, parameters.scale, parameters.shift)
    natural = output if of_base == 1 else graph.inner(output, "natural")
    graph.node("Log", [value], natural)
    if of_base != 1:
        graph.node("Div", [natural, graph.number(layer, "base", of_base)], output)


def _logarithm(graph: Graph, layer: StockLayer, base: float, field: str) -> float:
    """Of the base; -1 is e."""
    if base == -1:
        return 1.0
    if base <= 0 or (base == 1 and layer.type == "Log"):
        graph.refuse(layer, field, "it has to be positive and not 1, or -1 for e")
    return log(base)


def _affine(graph: Graph, layer: StockLayer, value: str, output: str, scale: float, shift: float) -> str:
    """The name of scale x + shift."""
    for kind, name, number, nothing in (("Mul", "scale", scale, 1), ("Add", "shift", shift, 0)):
        if number != nothing:
            given = graph.inner(output, name)
            graph.node(kind, [value, graph.number(layer, name, number)], given)
            value = given
    return value


def _clip(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    parameters = layer.message.clip_param
    limits = [graph.number(layer, name, getattr(parameters, name)) for name in ("min", "max")]
    graph.node("Clip", [*bottoms, *limits], output)


def _swish(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    value = _affine(graph, layer, bottoms[0], output, layer.message.swish_param.beta, 0)
    gate = graph.inner(output, "gate")
    graph.node("Sigmoid", [value], gate)
    graph.node("Mul", [*bottoms, gate], output)


def _threshold(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    from onnx import TensorProto

    above = graph.inner(output, "above")
    limit = graph.number(layer, "threshold", layer.message.threshold_param.threshold)
    graph.node("Greater", [*bottoms, limit], above)
    graph.node("Cast", [above], output, to=TensorProto.FLOAT)


def _dropout(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    # Caffe scales in training, so there is nothing to do here.
    graph.node("Identity", bottoms, output)


def _softmax(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    axis = layer.message.softmax_param.axis % len(input_shape(shaped))
    graph.node("Softmax", bottoms, output, axis=axis)


OPERATORS: dict[str, Operator] = {
    "AbsVal": _one("Abs"),
    "BNLL": _one("Softplus"),
    "Clip": _clip,
    "Dropout": _dropout,
    "ELU": _elu,
    "Exp": _exp,
    "Log": _log,
    "PReLU": _prelu,
    "Power": _power,
    "ReLU": _relu,
    "Sigmoid": _one("Sigmoid"),
    "Softmax": _softmax,
    "Swish": _swish,
    "TanH": _one("Tanh"),
    "Threshold": _threshold,
}
