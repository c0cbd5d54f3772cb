"""Layers that multiply by weights or add them: inner products, Embed, Scale, Bias."""

from __future__ import annotations

from caffe_jacinto.export.onnx.graph import Graph, Operator, by_channel, channelwise, input_shape
from caffe_jacinto.export.stock_net import StockLayer
from caffe_jacinto.netspec.shapes import LayerShapes


def _inner_product(
    graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str
) -> None:
    parameters = layer.message.inner_product_param
    if parameters.axis != 1:
        graph.refuse(layer, "inner_product_param.axis", "only 1")
    flat = bottoms[0]
    if len(input_shape(shaped)) != 2:
        flat = graph.inner(output, "flat")
        graph.node("Flatten", bottoms, flat, axis=1)
    blobs = graph.weights_and_bias(layer)
    graph.node("Gemm", [flat, *blobs], output, transB=0 if parameters.transpose else 1)


def _scale(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    if not channelwise(layer.message.scale_param):
        graph.refuse(layer, "scale_param.axis and num_axes", "only one number per channel")
    gain, *shifts = (by_channel(blob, len(input_shape(shaped))) for blob in layer.blobs)
    scaled = graph.inner(output, "scaled") if shifts else output
    graph.node("Mul", [*bottoms, graph.constant(f"{layer.name}:scale", gain)], scaled)
    if shifts:
        graph.node("Add", [scaled, graph.constant(f"{layer.name}:bias", shifts[0])], output)


def _bias(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    if not channelwise(layer.message.bias_param):
        graph.refuse(layer, "bias_param.axis and num_axes", "only one number per channel")
    values = by_channel(layer.blobs[0], len(input_shape(shaped)))
    graph.node("Add", [*bottoms, graph.constant(f"{layer.name}:bias", values)], output)


def _embed(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    from onnx import TensorProto

    numbers, weights = graph.inner(output, "numbers"), layer.blobs[0]
    graph.node("Cast", bottoms, numbers, to=TensorProto.INT64)
    rows = graph.inner(output, "rows") if len(layer.blobs) > 1 else output
    graph.node("Gather", [graph.constant(f"{layer.name}:weights", weights), numbers], rows)
    if len(layer.blobs) > 1:
        graph.node("Add", [rows, graph.constant(f"{layer.name}:bias", layer.blobs[1])], output)


OPERATORS: dict[str, Operator] = {
    "Bias": _bias,
    "Embed": _embed,
    "InnerProduct": _inner_product,
    "Scale": _scale,
}
