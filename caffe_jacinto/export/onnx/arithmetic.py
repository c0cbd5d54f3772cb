"""Layers that compute one value from several: across bottoms, or along axes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from caffe_jacinto.export.onnx.graph import Graph, Operator, input_shape
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


def _reduction(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    parameters, rank = layer.message.reduction_param, len(input_shape(shaped))
    axes = list(range(parameters.axis % rank, rank))
    if 0 in axes:
        graph.refuse(layer, "reduction_param.axis", "the size of the batch is not fixed")
    operation = parameters.ReductionOp.Name(parameters.operation)
    reduced = output if parameters.coeff == 1 else graph.inner(output, "reduced")
    if operation == "SUM":  # in opset 13, the only one whose axes are an input
        graph.node("ReduceSum", [*bottoms, graph.integers(layer, "axes", axes)], reduced, keepdims=0)
    else:
        kind = {"ASUM": "ReduceL1", "SUMSQ": "ReduceSumSquare", "MEAN": "ReduceMean"}[operation]
        graph.node(kind, bottoms, reduced, axes=axes, keepdims=0)
    if reduced != output:
        graph.node("Mul", [reduced, graph.number(layer, "coeff", parameters.coeff)], output)


def _arg_max(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    """Of equal numbers Caffe gives the last one first, and TopK the first: so the input is turned round."""
    from onnx import TensorProto

    parameters, shape = layer.message.argmax_param, input_shape(shaped)
    along = parameters.HasField("axis")
    value, axis, candidates = bottoms[0], parameters.axis % len(shape), shape[parameters.axis % len(shape)]
    if not along:
        value, axis, candidates = graph.inner(output, "flat"), 1, prod(shape[1:])
        graph.node("Flatten", bottoms, value, axis=1)
    elif axis == 0:
        graph.refuse(layer, "argmax_param.axis", "the size of the batch is not fixed")

    def step(kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        given = graph.inner(output, name)
        graph.node(kind, inputs, given, **attributes)
        return given

    ends = {"start": candidates - 1, "end": -candidates - 1, "axis": axis, "step": -1}
    turned = step(
        "Slice", [value, *(graph.integers(layer, name, [at]) for name, at in ends.items())], "turned"
    )
    largest, from_end = graph.inner(output, "largest"), graph.inner(output, "from_end")
    graph.node(
        "TopK", [turned, graph.integers(layer, "top_k", [parameters.top_k])], [largest, from_end], axis=axis
    )
    if along and parameters.out_max_val:
        graph.node("Identity", [largest], output)
        return
    numbered = step("Cast", [from_end], "numbered", to=TensorProto.FLOAT)
    places = step("Sub", [graph.number(layer, "last", candidates - 1), numbered], "places")
    if along:
        graph.node("Identity", [places], output)
        return
    rows = step("Concat", [places, largest], "rows", axis=1) if parameters.out_max_val else places
    target = graph.integers(layer, "shape", [0, *(shaped.tops[0] or ())[1:]])
    graph.node("Reshape", [rows, target], output)


OPERATORS: dict[str, Operator] = {
    "ArgMax": _arg_max,
    "Eltwise": _eltwise,
    "Reduction": _reduction,
}
