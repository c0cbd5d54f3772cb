"""The cost of a network, counted from its prototxt: multiply-accumulates and weights, layer by layer.

Multiply-accumulates (MACs) of convolutions and inner products, for one crop (batch 1); biases,
normalisation and pooling are left out, as the published tables do. What the text does not determine is
None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from caffe_jacinto.prototxt.tree import Message

Shape = tuple[int, ...]
"""Blob shape, the batch (1) first."""

CONVOLUTIONS = ("Convolution", "Deconvolution")
_SOFTMAXES = ("Softmax", "SoftmaxWithLoss")
_SAME_SHAPE = frozenset(
    {
        *("AbsVal", "BN", "BNLL", "BatchNorm", "Bias", "CuDNNBatchNorm", "Dropout", "ELU", "Eltwise", "Exp"),
        *(
            "LRN",
            "Log",
            "MVN",
            "PReLU",
            "Power",
            "Quantization",
            "ReLU",
            "ReLU6",
            "Scale",
            "Sigmoid",
            "Softmax",
        ),
        *("Swish", "TanH", "Threshold"),
    }
)
"""Layers whose output has the shape of their first input."""

_DATA_PARAMETERS = {
    "Data": "data_param",
    "AnnotatedData": "data_param",
    "ImageData": "image_data_param",
    "WindowData": "window_data_param",
    "HDF5Data": "hdf5_data_param",
    "MemoryData": "memory_data_param",
}
DATA_LAYERS = frozenset((*_DATA_PARAMETERS, "DummyData", "Input"))


@dataclass(frozen=True)
class LayerCost:
    """What a convolution or inner product costs."""

    name: str
    type: str
    macs: int | None
    """Multiply-accumulates of one crop; None where the input's shape is not known."""
    weights: int | None
    """Weights, without biases."""
    outputs: int
    """Output channels: as many as there are biases."""
    before_softmax: bool
    """Whether a softmax takes its output directly: it is the classifier."""


@dataclass(frozen=True)
class LayerShapes:
    """A layer with the shapes of the blobs around it; None: not known."""

    layer: Message
    kind: str
    """Its type."""

    bottoms: list[Shape | None]
    tops: list[Shape | None]


def gigamacs(net: Message, data_shapes: Sequence[Shape] = ()) -> float | None:
    """GigaMACs of one crop, or None where the text does not say enough.

    ``data_shapes`` are the shapes (batch, channels, height, width) of the blobs that the network's
    Data, ImageData and WindowData layers give, in order, where they are known.
    """
    costs = layer_costs(net, data_shapes)
    total = 0
    for cost in costs:
        if cost.macs is None:
            return None
        total += cost.macs
    return total / 1e9 if costs else None


def layer_costs(net: Message, data_shapes: Sequence[Shape] = ()) -> list[LayerCost]:
    """The convolutions and inner products of ``net`` in order, with their cost."""
    shaped = layer_shapes(net, data_shapes)
    layers = [item.layer for item in shaped]
    return [
        _cost(item, _feeds_softmax(layers, index))
        for index, item in enumerate(shaped)
        if item.kind in CONVOLUTIONS or item.kind == "InnerProduct" or item.layer.has("convolution_param")
    ]


def layer_shapes(net: Message, data_shapes: Sequence[Shape] = ()) -> list[LayerShapes]:
    """Every layer of ``net`` that takes part, in order, with the shapes around it; see `gigamacs`."""
    shapes: dict[str, Shape | None] = _declared_inputs(net)
    found = []
    given = iter(data_shapes)
    for layer in phase_layers(net):
        kind = layer.string("type")
        bottoms = [shapes.get(name) for name in layer.strings("bottom")]
        tops = layer.strings("top")
        if kind in DATA_LAYERS:
            known = next(given, None) if kind in ("Data", "ImageData", "WindowData") else None
            outputs = _data_shapes(layer, kind, len(tops), known)
        else:
            outputs = _output_shapes(layer, kind, bottoms, len(tops))
        outputs = [*outputs, *[None] * (len(tops) - len(outputs))]
        shapes.update(zip(tops, outputs, strict=False))
        found.append(LayerShapes(layer, kind, bottoms, outputs))
    return found


def phase_layers(net: Message) -> list[Message]:
    """The layers that take part in the phase of the network's ``state`` (all, where none is stated)."""
    phase = net.message("state").string("phase")

    def included(layer: Message) -> bool:
        def applies(rule: Message) -> bool:
            return rule.string("phase", phase) == phase

        rules = layer.messages("include")
        if rules:
            return any(applies(rule) for rule in rules)
        return not any(applies(rule) for rule in layer.messages("exclude"))

    layers = net.messages("layer")
    return [layer for layer in layers if included(layer)] if phase else layers


def batch_size(net: Message) -> int | None:
    """Images of one pass: the batch of the first data layer, or None where the text does not say."""
    for layer in phase_layers(net):
        kind = layer.string("type")
        if kind in _DATA_PARAMETERS:
            return layer.message(_DATA_PARAMETERS[kind]).optional_integer("batch_size")
        if kind in ("DummyData", "Input"):
            parameter = layer.message("dummy_data_param" if kind == "DummyData" else "input_param")
            dims = [shape.integers("dim") for shape in parameter.messages("shape")]
            if dims and dims[0]:
                return dims[0][0]
            return parameter.optional_integer("num")
    return None


def _declared_inputs(net: Message) -> dict[str, Shape | None]:
    """Blobs of the old ``input:`` form."""
    names = net.strings("input")
    shapes: list[Sequence[int]] = [shape.integers("dim") for shape in net.messages("input_shape")]
    dims = net.integers("input_dim")
    shapes = shapes or [dims[start : start + 4] for start in range(0, len(dims), 4)]
    return {name: _single(shape) for name, shape in zip(names, shapes, strict=False)}


def _single(dims: Sequence[int]) -> Shape | None:
    """The shape for a batch of one."""
    return (1, *dims[1:]) if dims and all(dim > 0 for dim in dims) else None


def _data_shapes(layer: Message, kind: str, tops: int, known: Shape | None) -> list[Shape | None]:
    if kind in ("DummyData", "Input"):
        parameter = layer.message("dummy_data_param" if kind == "DummyData" else "input_param")
        shapes = [_single(shape.integers("dim")) for shape in parameter.messages("shape")]
        if not shapes and parameter.has("channels"):
            names = ("num", "channels", "height", "width")
            shapes = [
                _single(dims) for dims in zip(*(parameter.integers(name) for name in names), strict=False)
            ]
        return shapes * tops if len(shapes) == 1 else shapes
    if kind == "MemoryData":
        parameter = layer.message("memory_data_param")
        return [_single([1, *(parameter.integer(name) for name in ("channels", "height", "width"))]), (1,)]
    return [_single(known) if known else _transformed_shape(layer, kind), *[(1,)] * (tops - 1)]


def _transformed_shape(layer: Message, kind: str) -> Shape | None:
    """The shape that a data layer's own settings fix: its crop, and channels where it names them."""
    transform = layer.message("transform_param")
    image = layer.message("image_data_param")
    crop = transform.integer("crop_size")
    height = crop or image.integer("new_height")
    width = crop or image.integer("new_width")
    means = len(transform.all("mean_value"))
    if kind == "ImageData":
        channels = 3 if image.flag("is_color", True) else 1
    else:
        channels = means if means > 1 else 0
    return _single([1, channels, height, width])


def _output_shapes(layer: Message, kind: str, bottoms: list[Shape | None], tops: int) -> list[Shape | None]:
    """The shapes of a layer's tops; None for what is not known."""
    if kind in _SAME_SHAPE:
        return [bottoms[0] if bottoms else None]
    if kind == "Split":
        return bottoms[:1] * tops
    rule = _RULES.get(kind)
    known = [shape for shape in bottoms if shape is not None]
    if rule is None or not bottoms or len(known) != len(bottoms):
        return [None] * tops
    try:
        found = rule(layer, known, tops)
    except (IndexError, ValueError, ZeroDivisionError):
        return [None] * tops
    return [shape if shape is not None and all(dim > 0 for dim in shape) else None for shape in found]


def _spatial(parameter: Message, name: str, prefix: str, axes: int, default: int) -> list[int]:
    """A setting for each spatial axis: repeated, one for all, or as ``_h`` and ``_w``."""
    values = parameter.integers(name)
    if not values and axes == 2 and parameter.has(f"{prefix}_h"):
        values = [parameter.integer(f"{prefix}_h"), parameter.integer(f"{prefix}_w")]
    if not values:
        values = [default]
    return values * axes if len(values) == 1 else values[:axes]


def _kernel(layer: Message, axes: int) -> list[int]:
    return _spatial(layer.message("convolution_param"), "kernel_size", "kernel", axes, 0)


def _convolution(layer: Message, bottoms: list[Shape], tops: int) -> list[Shape | None]:
    parameter = layer.message("convolution_param")
    batch, _, *sizes = bottoms[0]
    strides = _spatial(parameter, "stride", "stride", len(sizes), 1)
    pads = _spatial(parameter, "pad", "pad", len(sizes), 0)
    dilations = _spatial(parameter, "dilation", "dilation", len(sizes), 1)
    settings = zip(sizes, _kernel(layer, len(sizes)), strides, pads, dilations, strict=True)
    out = []
    for size, kernel, stride, pad, dilation in settings:
        extent = dilation * (kernel - 1) + 1
        if layer.string("type") == "Deconvolution":
            out.append(stride * (size - 1) + extent - 2 * pad)
        else:
            out.append((size + 2 * pad - extent) // stride + 1)
    return [(batch, parameter.integer("num_output"), *out)] * tops


def _pooling(layer: Message, bottoms: list[Shape], tops: int) -> list[Shape | None]:
    """Caffe rounds the size up, and with padding drops a last window that begins outside the image."""
    parameter = layer.message("pooling_param")
    batch, channels, *sizes = bottoms[0]
    if parameter.flag("global_pooling"):
        return [(batch, channels, *[1] * len(sizes))] * tops
    kernels = _spatial(parameter, "kernel_size", "kernel", len(sizes), 0)
    strides = _spatial(parameter, "stride", "stride", len(sizes), 1)
    pads = _spatial(parameter, "pad", "pad", len(sizes), 0)
    down = parameter.string("round_mode") == "FLOOR"
    out = []
    for size, kernel, stride, pad in zip(sizes, kernels, strides, pads, strict=True):
        room = size + 2 * pad - kernel
        pooled = (room // stride if down else -(-room // stride)) + 1
        if any(pads) and (pooled - 1) * stride >= size + pad:
            pooled -= 1
        out.append(pooled)
    return [(batch, channels, *out)] * tops


def _inner_product(layer: Message, bottoms: list[Shape], tops: int) -> list[Shape | None]:
    parameter = layer.message("inner_product_param")
    axis = parameter.integer("axis", 1)
    return [(*bottoms[0][:axis], parameter.integer("num_output"))] * tops


def _concat(layer: Message, bottoms: list[Shape], tops: int) -> list[Shape | None]:
    parameter = layer.message("concat_param")
    axis = parameter.integer("axis", parameter.integer("concat_dim", 1)) % len(bottoms[0])
    total = sum(shape[axis] for shape in bottoms)
    return [(*bottoms[0][:axis], total, *bottoms[0][axis + 1 :])]


def _slice(layer: Message, bottoms: list[Shape], tops: int) -> list[Shape | None]:
    parameter = layer.message("slice_param")
    shape = bottoms[0]
    axis = parameter.integer("axis", parameter.integer("slice_dim", 1)) % len(shape)
    points = parameter.integers("slice_point")
    if not points:
        points = [shape[axis] // tops * number for number in range(1, tops)]
    edges = [0, *points, shape[axis]]
    return [(*shape[:axis], end - start, *shape[axis + 1 :]) for start, end in pairwise(edges)]


def _flatten(layer: Message, bottoms: list[Shape], tops: int) -> list[Shape | None]:
    parameter = layer.message("flatten_param")
    shape = bottoms[0]
    axis = parameter.integer("axis", 1) % len(shape)
    end = parameter.integer("end_axis", -1) % len(shape)
    return [(*shape[:axis], math.prod(shape[axis : end + 1]), *shape[end + 1 :])]


def _reshape(layer: Message, bottoms: list[Shape], tops: int) -> list[Shape | None]:
    parameter = layer.message("reshape_param")
    shape = bottoms[0]
    start = parameter.integer("axis")
    start += len(shape) + 1 if start < 0 else 0
    count = parameter.integer("num_axes", -1)
    end = len(shape) if count == -1 else start + count
    dims = parameter.message("shape").integers("dim")
    inner = [shape[start + axis] if dim == 0 else dim for axis, dim in enumerate(dims)]
    out = [*shape[:start], *inner, *shape[end:]]
    if out.count(-1) == 1:
        out[out.index(-1)] = math.prod(shape) // math.prod(dim for dim in out if dim != -1)
    return [tuple(out) if math.prod(out) == math.prod(shape) else None]


def _crop(layer: Message, bottoms: list[Shape], tops: int) -> list[Shape | None]:
    axis = layer.message("crop_param").integer("axis", 2) % len(bottoms[0])
    return [(*bottoms[0][:axis], *bottoms[1][axis:])]


_Rule = Callable[[Message, list[Shape], int], list[Shape | None]]
_RULES: dict[str, _Rule] = {
    "Convolution": _convolution,
    "Deconvolution": _convolution,
    "Pooling": _pooling,
    "InnerProduct": _inner_product,
    "Concat": _concat,
    "Slice": _slice,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Crop": _crop,
}


def _cost(item: LayerShapes, before_softmax: bool) -> LayerCost:
    """The cost of a convolution or inner product; of another layer with a convolution inside: not known."""
    layer, kind, bottoms, outputs = item.layer, item.kind, item.bottoms, item.tops
    name = layer.string("name")
    parameter = layer.message("inner_product_param" if kind == "InnerProduct" else "convolution_param")
    filters = parameter.integer("num_output")
    source = bottoms[0] if bottoms else None
    target = outputs[0] if outputs else None
    if source is None or target is None or not (kind in CONVOLUTIONS or kind == "InnerProduct"):
        return LayerCost(name, kind, None, None, filters, before_softmax)
    if kind == "InnerProduct":
        axis = parameter.integer("axis", 1) % len(source)
        weights = math.prod(source[axis:]) * filters
        return LayerCost(name, kind, weights * math.prod(source[:axis]), weights, filters, before_softmax)
    group = max(1, parameter.integer("group", 1))
    weights = filters * source[1] * math.prod(_kernel(layer, len(source) - 2)) // group
    positions = math.prod((target if kind == "Convolution" else source)[2:])
    # Several bottoms share one set of weights, each with its own top.
    return LayerCost(name, kind, weights * positions * len(bottoms), weights, filters, before_softmax)


def _feeds_softmax(layers: list[Message], index: int) -> bool:
    """Whether a softmax reads the layer's output as it leaves it, nothing in between or in place."""
    for top in layers[index].strings("top"):
        for later in layers[index + 1 :]:
            if top in later.strings("bottom")[:1] and later.string("type") in _SOFTMAXES:
                return True
            if top in later.strings("top"):
                break
    return False
