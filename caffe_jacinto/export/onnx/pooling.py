"""Pooling over windows of the image."""

from __future__ import annotations

from caffe_jacinto.export.onnx.graph import Graph, Operator, input_shape
from caffe_jacinto.export.stock_net import StockLayer
from caffe_jacinto.netspec.layer_types import geometry
from caffe_jacinto.netspec.shapes import LayerShapes


def _pooling(
    graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], outputs: list[str]
) -> None:
    parameters, output = layer.message.pooling_param, outputs[0]
    method = parameters.PoolMethod.Name(parameters.pool)
    if method not in ("MAX", "AVE"):
        graph.refuse(layer, "pooling_param.pool", "only MAX and AVE")
    if len(outputs) > 1 and (method != "MAX" or parameters.global_pooling):
        graph.refuse(layer, "second top", "only max pooling over windows has a mask")
    if parameters.global_pooling:
        graph.node("GlobalMaxPool" if method == "MAX" else "GlobalAveragePool", bottoms, output)
        return
    sizes, pooled = input_shape(shaped)[2:], (shaped.tops[0] or ())[2:]
    if len(sizes) != 2:
        graph.refuse(layer, "input", "only images, of four axes")
    kernel, stride, pad, _ = geometry(shaped.layer)
    # How far the last window reaches beyond the image: Caffe rounds the number of windows up.
    ends = [
        max((pooled[axis] - 1) * stride[axis] + kernel[axis] - sizes[axis] - pad[axis], 0) for axis in (0, 1)
    ]
    if any((pooled[axis] - 1) * stride[axis] - pad[axis] >= sizes[axis] for axis in (0, 1)):
        graph.refuse(layer, "stride", "it is larger than the kernel, and a window lies outside the image")
    shape = {"kernel_shape": list(kernel), "strides": list(stride)}
    if method == "MAX":
        places = [graph.inner(outputs[1], "places")] if len(outputs) > 1 else []
        graph.node("MaxPool", bottoms, [output, *places], pads=[*pad, *ends], **shape)
        if places:
            # ONNX counts through the whole batch, Caffe through the plane of each channel.
            own = graph.inner(outputs[1], "own")
            graph.node("Mod", [*places, graph.integers(layer, "plane", [sizes[0] * sizes[1]])], own)
            graph.node("Cast", [own], outputs[1], to=1)  # TensorProto.FLOAT
        return
    # Caffe divides by the part of the window inside the image and its padding. ONNX counts all padding or
    # none, so the padding becomes zeros of the image, and only what reaches beyond it is padding to ONNX.
    zeros = [min(end, own) for end, own in zip(ends, pad, strict=True)]
    beyond = [end - zero for end, zero in zip(ends, zeros, strict=True)]
    if not any(beyond):
        graph.node("AveragePool", bottoms, output, pads=[*pad, *ends], count_include_pad=1, **shape)
        return
    value = bottoms[0]
    if any(pad):
        import numpy as np

        padded = graph.inner(output, "padded")
        pads = graph.constant(f"{layer.name}:pads", np.array([0, 0, *pad, 0, 0, *zeros], np.int64))
        graph.node("Pad", [value, pads], padded)
        value = padded
    graph.node("AveragePool", [value], output, pads=[0, 0, *beyond], count_include_pad=0, **shape)


OPERATORS: dict[str, Operator] = {
    "Pooling": _pooling,
}
