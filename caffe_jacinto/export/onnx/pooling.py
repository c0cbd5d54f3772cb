"""Pooling over windows of the image."""

from __future__ import annotations

from collections.abc import Sequence

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
    _average(graph, layer, bottoms[0], output, shape, pad, ends)


def _average(
    graph: Graph,
    layer: StockLayer,
    value: str,
    output: str,
    shape: dict[str, list[int]],
    pad: Sequence[int],
    ends: Sequence[int],
) -> None:
    """``shape``: kernel and strides; ``ends``: how far the last windows reach beyond the image."""
    # Caffe divides by the part of the window inside the image and its padding. ONNX counts all padding or
    # none, so the padding becomes zeros of the image, and only what reaches beyond it is padding to ONNX.
    zeros = [min(end, own) for end, own in zip(ends, pad, strict=True)]
    beyond = [end - zero for end, zero in zip(ends, zeros, strict=True)]
    if not any(beyond):
        graph.node("AveragePool", [value], output, pads=[*pad, *ends], count_include_pad=1, **shape)
        return
    if any(pad):
        padded = graph.inner(output, "padded")
        pads = graph.integers(layer, "pads", [0, 0, *pad, 0, 0, *zeros])
        graph.node("Pad", [value, pads], padded)
        value = padded
    graph.node("AveragePool", [value], output, pads=[0, 0, *beyond], count_include_pad=0, **shape)


def _pyramid(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    """SPP: each level a pooling, flattened, and all of them in one row."""
    parameters, sizes = layer.message.spp_param, input_shape(shaped)[2:]
    method = parameters.PoolMethod.Name(parameters.pool)
    if method not in ("MAX", "AVE"):
        graph.refuse(layer, "spp_param.pool", "only MAX and AVE")
    if parameters.pyramid_height == 1:  # that pooling alone, not in a row
        graph.node("GlobalMaxPool" if method == "MAX" else "GlobalAveragePool", bottoms, output)
        return
    rows = []
    for level in range(parameters.pyramid_height):
        bins = 2**level
        kernel = [-(-side // bins) for side in sizes]
        pad = [(step * bins - side + 1) // 2 for step, side in zip(kernel, sizes, strict=True)]
        if len(sizes) != 2 or any(before >= step for before, step in zip(pad, kernel, strict=True)):
            graph.refuse(layer, "spp_param.pyramid_height", "the image cannot be cut into that many windows")
        ends = [step * bins - side - before for step, side, before in zip(kernel, sizes, pad, strict=True)]
        pooled, row = graph.inner(output, f"level{level}"), graph.inner(output, f"row{level}")
        shape = {"kernel_shape": kernel, "strides": kernel}
        if method == "MAX":
            graph.node("MaxPool", bottoms, pooled, pads=[*pad, *ends], **shape)
        else:
            _average(graph, layer, bottoms[0], pooled, shape, pad, ends)
        graph.node("Flatten", [pooled], row, axis=1)
        rows.append(row)
    graph.node("Concat", rows, output, axis=1)


OPERATORS: dict[str, Operator] = {
    "Pooling": _pooling,
    "SPP": _pyramid,
}
