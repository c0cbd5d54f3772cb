"""Convolutions and deconvolutions."""

from __future__ import annotations

from caffe_jacinto.export.onnx.graph import Graph, Operator, input_shape
from caffe_jacinto.export.stock_net import StockLayer
from caffe_jacinto.netspec.layer_types import geometry
from caffe_jacinto.netspec.shapes import LayerShapes


def _convolution(
    graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str
) -> None:
    """The weights have one layout in Caffe and ONNX, for a deconvolution, too."""
    parameters = layer.message.convolution_param
    if parameters.axis != 1 or len(input_shape(shaped)) != 4:
        graph.refuse(layer, "convolution_param.axis", "only images, of four axes")
    kernel, strides, pads, dilations = geometry(shaped.layer)
    blobs = graph.weights_and_bias(layer)
    graph.node(
        "ConvTranspose" if layer.type == "Deconvolution" else "Conv",
        [*bottoms, *blobs],
        output,
        kernel_shape=list(kernel),
        strides=list(strides),
        pads=[*pads, *pads],
        dilations=list(dilations),
        group=parameters.group,
    )


OPERATORS: dict[str, Operator] = {
    "Convolution": _convolution,
    "Deconvolution": _convolution,
}
