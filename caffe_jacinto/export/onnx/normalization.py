"""Layers that normalize their input."""

from __future__ import annotations

from typing import Any

from caffe_jacinto.export.onnx.graph import Graph, Operator, input_shape
from caffe_jacinto.export.stock_net import StockLayer
from caffe_jacinto.netspec.shapes import LayerShapes


def _batch_norm(
    graph: Graph,
    layer: StockLayer,
    shaped: LayerShapes,
    bottoms: list[str],
    output: str,
    scale: StockLayer | None = None,
) -> None:
    import numpy as np

    mean, variance = layer.blobs[:2]
    gain = scale.blobs[0] if scale else np.ones_like(mean)
    shift = scale.blobs[1] if scale and len(scale.blobs) > 1 else np.zeros_like(mean)
    values = {"scale": gain, "bias": shift, "mean": mean, "variance": variance}
    names = [graph.constant(f"{layer.name}:{name}", blob) for name, blob in values.items()]
    epsilon = float(layer.message.batch_norm_param.eps)
    graph.node("BatchNormalization", [*bottoms, *names], output, epsilon=epsilon)


def _lrn(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    parameters = layer.message.lrn_param
    if parameters.norm_region != parameters.ACROSS_CHANNELS:
        graph.refuse(layer, "lrn_param.norm_region", "only ACROSS_CHANNELS")
    graph.node(
        "LRN",
        bottoms,
        output,
        size=parameters.local_size,
        alpha=parameters.alpha,
        beta=parameters.beta,
        bias=parameters.k,
    )


def _mean_variance(
    graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str
) -> None:
    parameters, rank = layer.message.mvn_param, len(input_shape(shaped))
    axes = list(range(1 if parameters.across_channels else 2, rank))
    if rank != 4:
        graph.refuse(layer, "input", "only images, of four axes")

    def step(kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        given = graph.inner(output, name)
        graph.node(kind, inputs, given, **attributes)
        return given

    mean = step("ReduceMean", bottoms, "mean", axes=axes, keepdims=1)
    if not parameters.normalize_variance:
        graph.node("Sub", [*bottoms, mean], output)
        return
    centred = step("Sub", [*bottoms, mean], "centred")
    squares = step("Mul", [centred, centred], "squares")
    deviation = step("Sqrt", [step("ReduceMean", [squares], "variance", axes=axes, keepdims=1)], "deviation")
    divisor = step("Add", [deviation, graph.number(layer, "eps", parameters.eps)], "divisor")
    graph.node("Div", [centred, divisor], output)


OPERATORS: dict[str, Operator] = {
    "BatchNorm": _batch_norm,
    "LRN": _lrn,
    "MVN": _mean_variance,
}
