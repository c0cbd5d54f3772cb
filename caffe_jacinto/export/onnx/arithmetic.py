"""Layers that compute one value from several: across bottoms, or along axes."""

from __future__ import annotations

from caffe_jacinto.export.onnx.graph import Graph, Operator
from caffe_jacinto.export.stock_net import StockLayer
from caffe_jacinto.netspec.shapes import LayerShapes


def _eltwise(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    parameters = layer.message.eltwise_param
    kind = {parameters.SUM: "Sum", parameters.MAX: "Max"}.get(parameters.operation, "Mul")
    terms = list(bottoms)
    if parameters.coeff:
        if kind != "Sum" or len(parameters.coeff) != len(bottoms):
            graph.refuse(layer, "eltwise_param.coeff", "only SUM has them, one for each input")
        for number, factor in enumerate(parameters.coeff):
            if factor != 1:
                terms[number] = graph.inner(output, f"term{number}")
                coefficient = graph.number(layer, f"coeff{number}", factor)
                graph.node("Mul", [bottoms[number], coefficient], terms[number])
    if kind != "Mul":
        graph.node(kind, terms, output)
        return
    value = terms[0]
    for number, term in enumerate(terms[1:], 2):
        given = output if number == len(terms) else graph.inner(output, f"product{number}")
        graph.node("Mul", [value, term], given)
        value = given


OPERATORS: dict[str, Operator] = {
    "Eltwise": _eltwise,
}
