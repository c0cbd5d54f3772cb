"""Layers that forks of Caffe added; `stock_net` has made those that stock Caffe has, too, into its own."""

from __future__ import annotations

from caffe_jacinto.export.onnx.graph import Graph, Operator, input_shape
from caffe_jacinto.export.stock_net import StockLayer
from caffe_jacinto.netspec.layer_types.forks import permuted_axes, upsampling
from caffe_jacinto.netspec.shapes import LayerShapes


def _axpy(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    factors, images, added = bottoms
    channels = (shaped.tops[0] or ())[1]
    spread, scaled = graph.inner(output, "factors"), graph.inner(output, "scaled")
    axes = [1] * (len(shaped.tops[0] or ()) - 2)
    graph.node("Reshape", [factors, graph.integers(layer, "shape", [0, channels, *axes])], spread)
    graph.node("Mul", [images, spread], scaled)
    graph.node("Add", [scaled, added], output)


def _normalize(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    parameters, axes = layer.message.norm_param, len(input_shape(shaped))
    along = list(range(1, axes)) if parameters.across_spatial else [1]
    names = [graph.inner(output, step) for step in ("squares", "sum", "positive", "length", "normalized")]
    squares, total, positive, length, normalized = names
    graph.node("Mul", [bottoms[0], bottoms[0]], squares)
    graph.node("ReduceSum", [squares, graph.integers(layer, "axes", along)], total, keepdims=1)
    graph.node("Add", [total, graph.number(layer, "eps", parameters.eps)], positive)
    graph.node("Sqrt", [positive], length)
    graph.node("Div", [bottoms[0], length], normalized)
    scale = layer.blobs[0].reshape(() if parameters.channel_shared else (-1, *[1] * (axes - 2)))
    graph.node("Mul", [normalized, graph.constant(f"{layer.name}:scale", scale)], output)


def _permute(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    order = permuted_axes(shaped.layer, len(input_shape(shaped)))
    if order[:1] != (0,):
        graph.refuse(layer, "permute_param.order", "the first axis has to stay the batch")
    graph.node("Transpose", bottoms, output, perm=list(order))


def _shuffle(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    group, (_, channels, *rest) = layer.message.shuffle_channel_param.group, input_shape(shaped)
    if group < 1 or channels % group:
        graph.refuse(layer, "shuffle_channel_param.group", f"it does not divide {channels} channels")
    grouped, swapped = graph.inner(output, "grouped"), graph.inner(output, "swapped")
    apart = graph.integers(layer, "groups", [0, group, channels // group, *rest])
    graph.node("Reshape", [*bottoms, apart], grouped)
    graph.node("Transpose", [grouped], swapped, perm=[0, 2, 1, *range(3, 3 + len(rest))])
    graph.node("Reshape", [swapped, graph.integers(layer, "shape", [0, channels, *rest])], output)


def _interp(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    """The size is computed in the graph: ONNX wants that of the batch with it."""
    parameters, value = layer.message.interp_param, bottoms[0]
    sizes, made = input_shape(shaped)[2:], (shaped.tops[0] or ())[2:]
    if parameters.pad_beg or parameters.pad_end:
        cut = graph.inner(output, "cut")
        ends = [size + parameters.pad_end for size in sizes]
        bounds = {"begins": [-parameters.pad_beg] * 2, "ends": ends, "axes": [2, 3]}
        graph.node("Slice", [value, *(graph.integers(layer, *pair) for pair in bounds.items())], cut)
        value = cut
    whole, first, size = (graph.inner(output, step) for step in ("shape", "first", "size"))
    graph.node("Shape", [value], whole)
    graph.node("Slice", [whole, graph.integers(layer, "from", [0]), graph.integers(layer, "to", [2])], first)
    graph.node("Concat", [first, graph.integers(layer, "size", list(made))], size, axis=0)
    graph.node(
        "Resize", [value, "", "", size], output, mode="linear", coordinate_transformation_mode="align_corners"
    )


def _upsample(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    import numpy as np

    if len(bottoms) == 2:
        _unpool(graph, layer, shaped, bottoms, output)
        return
    scales = np.array([1, 1, *upsampling(shaped.layer).scale], np.float32)
    graph.node(
        "Resize",
        [bottoms[0], "", graph.constant(f"{layer.name}:scales", scales)],
        output,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def _unpool(graph: Graph, layer: StockLayer, shaped: LayerShapes, bottoms: list[str], output: str) -> None:
    """Zeros, and the values at the places that the mask has in the plane of each channel."""
    _, channels, height, width = shaped.tops[0] or ()
    steps = ("values", "mask", "places", "shape", "batch", "size", "zeros", "filled")
    values, mask, places, shape, batch, size, zeros, filled = (graph.inner(output, step) for step in steps)
    flat = graph.integers(layer, "flat", [0, channels, -1])
    graph.node("Reshape", [bottoms[0], flat], values)
    graph.node("Reshape", [bottoms[1], flat], mask)
    graph.node("Cast", [mask], places, to=7)  # TensorProto.INT64
    graph.node("Shape", [values], shape)
    graph.node("Slice", [shape, graph.integers(layer, "from", [0]), graph.integers(layer, "to", [2])], batch)
    graph.node("Concat", [batch, graph.integers(layer, "plane", [height * width])], size, axis=0)
    graph.node("ConstantOfShape", [size], zeros)
    graph.node("ScatterElements", [zeros, places, values], filled, axis=2)
    graph.node("Reshape", [filled, graph.integers(layer, "image", [0, channels, height, width])], output)


OPERATORS: dict[str, Operator] = {
    "Axpy": _axpy,
    "Interp": _interp,
    "Normalize": _normalize,
    "Permute": _permute,
    "ShuffleChannel": _shuffle,
    "Upsample": _upsample,
}
