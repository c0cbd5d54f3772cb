"""The types of layers: the shapes that each gives, the blobs that it has, and how it is drawn. One table.

Rules follow Caffe 1.0's Reshape and LayerSetUp methods (src/caffe/layers). A dimension that the network does
not determine is None; so is a shape of which nothing is known. A new type of layer is one entry here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from caffe_jacinto.prototxt.tree import Message

Dim = int | None
Shape = tuple[Dim, ...]
Shapes = Sequence[Shape | None]

Role = Literal["convolution", "inner product", "pooling", "data", "follower", "other"]
"""What a layer is in a drawing; a follower shares the box of the layer before it."""


@dataclass(frozen=True)
class LayerType:
    """One type of layer."""

    tops: Callable[[Message, Shapes, int], Shapes]
    """The shapes of the tops, from the layer, the shapes of its bottoms and the number of its tops."""

    blobs: Callable[[Message, Shapes], list[Shape]] = lambda layer, bottoms: []
    """The shapes of the blobs."""

    blob_names: tuple[str, ...] = ()
    role: Role = "other"


class Geometry(NamedTuple):
    """Kernel, stride, pad and dilation of a convolution or pooling for each spatial axis (height, width)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilation: tuple[int, ...]


def geometry(layer: Message, axes: int = 2) -> Geometry:
    """The geometry of a Convolution, Deconvolution or Pooling layer over ``axes`` spatial axes."""
    pooling = layer.string("type") == "Pooling"
    parameter = layer.message("pooling_param" if pooling else "convolution_param")

    def setting(name: str, default: int) -> tuple[int, ...]:
        short = name.removesuffix("_size")
        # Pooling reads height and width where the height is given, a convolution where either is.
        if parameter.has(f"{short}_h") or (parameter.has(f"{short}_w") and not pooling):
            return parameter.integer(f"{short}_h", default), parameter.integer(f"{short}_w", default)
        values = parameter.integers(name) or [default]
        return tuple((values * axes if len(values) == 1 else values)[:axes])

    kernel, dilation = setting("kernel_size", 0), setting("dilation", 1)
    return Geometry(kernel, setting("stride", 1), setting("pad", 0), dilation)


def is_known(shape: Shape | None) -> bool:
    """Whether all of a shape is known."""
    return shape is not None and None not in shape


def output_shapes(layer: Message, bottoms: Shapes, tops: int) -> list[Shape | None]:
    """The shapes of a layer's ``tops`` outputs; a dimension below 1 is an output of which nothing is left."""
    kind = LAYER_TYPES.get(layer.string("type"))
    found: list[Shape | None] = []
    if kind is not None:
        try:
            found = list(kind.tops(layer, bottoms, tops))
        except (IndexError, ValueError, TypeError, ZeroDivisionError):  # the layer does not fit its input
            found = []
    return (found + [None] * tops)[:tops]


def blob_shapes_of(layer: Message, bottoms: Shapes) -> list[Shape]:
    """The shapes of a layer's blobs, as far as the network determines them."""
    kind = LAYER_TYPES.get(layer.string("type"))
    return kind.blobs(layer, bottoms) if kind is not None and bottoms else []


def blob_name(layer_type: str, index: int) -> str:
    """What blob number ``index`` of a layer of this type holds."""
    names = LAYER_TYPES[layer_type].blob_names if layer_type in LAYER_TYPES else ()
    return names[index] if index < len(names) else f"blob {index}"


def role_of(layer_type: str) -> Role:
    """How a layer of this type is drawn."""
    return LAYER_TYPES[layer_type].role if layer_type in LAYER_TYPES else "other"


def _first(bottoms: Shapes) -> Shape | None:
    return bottoms[0] if bottoms else None


def _channels(bottoms: Shapes) -> Dim:
    first = _first(bottoms)
    if first is None:
        return None
    return first[1] if len(first) > 1 else 1


def _product(dims: Sequence[Dim]) -> Dim:
    known = [dim for dim in dims if dim is not None]
    return math.prod(known) if len(known) == len(dims) else None


# Shapes of tops


def _same(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    return [_first(bottoms)]


def _convolution(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    first = _image(bottoms)
    kernel, stride, pad, dilation = geometry(layer, len(first) - 2)
    sizes: list[Dim] = []
    for axis, size in enumerate(first[2:]):
        extent = dilation[axis] * (kernel[axis] - 1) + 1
        if size is None:
            sizes.append(None)
        elif layer.string("type") == "Deconvolution":
            sizes.append(stride[axis] * (size - 1) + extent - 2 * pad[axis])
        else:
            sizes.append((size + 2 * pad[axis] - extent) // stride[axis] + 1)
    return [(first[0], layer.message("convolution_param").integer("num_output"), *sizes)] * tops


def _pooling(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """Caffe rounds the size up, and with padding drops a last window that begins outside the image."""
    first = _image(bottoms)
    parameter = layer.message("pooling_param")
    if parameter.flag("global_pooling"):
        return [(*first[:2], *[1] * (len(first) - 2))] * tops
    kernel, stride, pad, _ = geometry(layer, len(first) - 2)
    down = parameter.string("round_mode") == "FLOOR"
    sizes: list[Dim] = []
    for axis, size in enumerate(first[2:]):
        if size is None:
            sizes.append(None)
            continue
        room = size + 2 * pad[axis] - kernel[axis]
        pooled = (room // stride[axis] if down else -(-room // stride[axis])) + 1
        if any(pad) and (pooled - 1) * stride[axis] >= size + pad[axis]:
            pooled -= 1
        sizes.append(pooled)
    return [(*first[:2], *sizes)] * tops


def _inner_product(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    parameter = layer.message("inner_product_param")
    first = _first(bottoms) or (None, None)
    return [(*first[: _axis(parameter, 1, first)], parameter.integer("num_output"))] * tops


def _concat(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    parameter = layer.message("concat_param")
    known = [shape for shape in bottoms if shape is not None]
    if len(known) != len(bottoms):
        return [None]
    axis = parameter.integer("axis", parameter.integer("concat_dim", 1)) % len(known[0])
    sizes = [shape[axis] for shape in known]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    return [(*known[0][:axis], total, *known[0][axis + 1 :])]


def _slice(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    parameter = layer.message("slice_param")
    shape = _required(bottoms)
    axis = parameter.integer("axis", parameter.integer("slice_dim", 1)) % len(shape)
    size, points = shape[axis], parameter.integers("slice_point")
    if size is None:
        return [None] * tops
    edges = [0, *(points or [size // tops * number for number in range(1, tops)]), size]
    return [(*shape[:axis], end - start, *shape[axis + 1 :]) for start, end in pairwise(edges)]


def _flatten(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    parameter = layer.message("flatten_param")
    shape = _required(bottoms)
    axis, end = _axis(parameter, 1, shape), parameter.integer("end_axis", -1) % len(shape)
    return [(*shape[:axis], _product(shape[axis : end + 1]), *shape[end + 1 :])]


def _reshape(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    parameter = layer.message("reshape_param")
    shape = _required(bottoms)
    start = parameter.integer("axis")
    start += len(shape) + 1 if start < 0 else 0
    count = parameter.integer("num_axes", -1)
    end = len(shape) if count == -1 else start + count
    dims = parameter.message("shape").integers("dim")
    out: list[Dim] = [
        *shape[:start],
        *(shape[start + axis] if dim == 0 else dim for axis, dim in enumerate(dims)),
        *shape[end:],
    ]
    total, rest = _product(shape), _product([dim for dim in out if dim != -1])
    if out.count(-1) == 1:
        out[out.index(-1)] = None if total is None or not rest else total // rest
    if total is not None and None not in out and _product(out) != total:
        return [None]
    return [tuple(out)]


def _crop(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    first, second = _required(bottoms), _required(bottoms[1:])
    axis = layer.message("crop_param").integer("axis", 2) % len(first)
    return [(*first[:axis], *second[axis:])]


def _split(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    return [_first(bottoms)] * tops


def _scalar(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """A loss or an accuracy; a second top of SoftmaxWithLoss holds the probabilities."""
    return [(), _first(bottoms)]


def _declared(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """Input and DummyData say their shapes themselves."""
    dummy = layer.string("type") == "DummyData"
    parameter = layer.message("dummy_data_param" if dummy else "input_param")
    shapes: list[Shape | None] = [tuple(shape.integers("dim")) for shape in parameter.messages("shape")]
    if not shapes and parameter.has("channels"):
        names = ("num", "channels", "height", "width")
        shapes = [tuple(dims) for dims in zip(*(parameter.integers(name) for name in names), strict=False)]
    return shapes * tops if len(shapes) == 1 else shapes


def _images(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """The images of a data layer: its crop, and the channels where it names them; then the labels."""
    kind = layer.string("type")
    transform = layer.message("transform_param")
    parameter = layer.message(DATA_PARAMETERS[kind])
    batch = parameter.optional_integer("batch_size")
    if kind == "MemoryData":
        return [(batch, *(parameter.integer(name) for name in ("channels", "height", "width"))), (batch,)]
    crop = transform.integer("crop_size")
    height = crop or parameter.integer("new_height") or None
    width = crop or parameter.integer("new_width") or None
    means = len(transform.all("mean_value"))
    channels: Dim = means if means > 1 else None
    if kind == "ImageData":
        channels = 3 if parameter.flag("is_color", True) else 1
    return [(batch, channels, height, width), *[(batch,)] * (tops - 1)]


def _axis(parameter: Message, default: int, shape: Shape) -> int:
    return parameter.integer("axis", default) % len(shape)


def _image(bottoms: Shapes) -> Shape:
    """Batch x channels x spatial axes; two of these where nothing is known."""
    first = _first(bottoms) or (None, None, None, None)
    if len(first) < 3:
        raise ValueError("the input is not an image")
    return first


def _required(bottoms: Shapes) -> Shape:
    first = _first(bottoms)
    if first is None:
        raise ValueError("the shape of the input is not known")
    return first


# Shapes of blobs


def _with_bias(layer: Message, parameter: Message, weights: Shape) -> list[Shape]:
    return [weights, (parameter.integer("num_output"),)] if parameter.flag("bias_term", True) else [weights]


def _convolution_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    parameter = layer.message("convolution_param")
    group, outputs = max(parameter.integer("group", 1), 1), parameter.integer("num_output")
    channels = _channels(bottoms)
    first = _first(bottoms)
    kernel = geometry(layer, 2 if first is None else max(len(first) - 2, 1)).kernel
    if layer.string("type") == "Deconvolution":
        return _with_bias(layer, parameter, (channels, outputs // group, *kernel))
    return _with_bias(layer, parameter, (outputs, None if channels is None else channels // group, *kernel))


def _inner_product_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    parameter = layer.message("inner_product_param")
    first = _first(bottoms)
    inputs = None if first is None else _product(first[_axis(parameter, 1, first) :])
    weights: Shape = (parameter.integer("num_output"), inputs)
    return _with_bias(layer, parameter, weights[::-1] if parameter.flag("transpose") else weights)


def _batch_norm_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    channels: Shape = (_channels(bottoms),)
    statistics: list[Shape] = [channels, channels, (1,)]
    fork = layer.message("batch_norm_param").flag("scale_bias")
    return [*statistics, channels, channels] if fork else statistics


def _scale_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    parameter = layer.message("scale_param")
    bias = parameter.flag("bias_term")
    if len(bottoms) == 2:
        return [(None,) if bottoms[1] is None else bottoms[1]] if bias else []
    return [_from_axis(parameter, bottoms)] * (2 if bias else 1)


def _bias_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    return [_from_axis(layer.message("bias_param"), bottoms)] if len(bottoms) == 1 else []


def _from_axis(parameter: Message, bottoms: Shapes) -> Shape:
    """The axes that a Scale or Bias has numbers of its own for."""
    first, count = _first(bottoms), parameter.integer("num_axes", 1)
    if count == 0:
        return ()
    if first is None:
        return (None,)
    start = _axis(parameter, 1, first)
    return first[start:] if count == -1 else first[start : start + count]


def _prelu_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    return [() if layer.message("prelu_param").flag("channel_shared") else (_channels(bottoms),)]


DATA_PARAMETERS = {
    "Data": "data_param",
    "AnnotatedData": "data_param",
    "ImageData": "image_data_param",
    "WindowData": "window_data_param",
    "HDF5Data": "hdf5_data_param",
    "MemoryData": "memory_data_param",
}
"""The layers that read a data set, and the message with their batch size."""

WEIGHTS = ("weights", "bias")

LAYER_TYPES: dict[str, LayerType] = {
    **{kind: LayerType(_images, role="data") for kind in DATA_PARAMETERS},
    "Input": LayerType(_declared, role="data"),
    "DummyData": LayerType(_declared, role="data"),
    "Convolution": LayerType(_convolution, _convolution_blobs, WEIGHTS, "convolution"),
    "Deconvolution": LayerType(_convolution, _convolution_blobs, WEIGHTS, "convolution"),
    "InnerProduct": LayerType(_inner_product, _inner_product_blobs, WEIGHTS, "inner product"),
    "Pooling": LayerType(_pooling, role="pooling"),
    "BatchNorm": LayerType(
        _same, _batch_norm_blobs, ("mean", "variance", "factor", "scale", "bias"), "follower"
    ),
    "Scale": LayerType(_same, _scale_blobs, ("scale", "bias"), "follower"),
    "Bias": LayerType(_same, _bias_blobs, ("bias",), "follower"),
    "PReLU": LayerType(_same, _prelu_blobs, ("slope",), "follower"),
    **{
        kind: LayerType(_same, role="follower")
        for kind in ("Dropout", "ELU", "LRN", "Power", "ReLU", "ReLU6", "Sigmoid", "TanH")
    },
    **{
        kind: LayerType(_same)
        for kind in (
            *("AbsVal", "BN", "BNLL", "Clip", "CuDNNBatchNorm", "Eltwise", "Exp", "Log", "MVN"),
            *("Quantization", "Softmax", "Swish", "Threshold"),
        )
    },
    "Concat": LayerType(_concat),
    "Slice": LayerType(_slice),
    "Flatten": LayerType(_flatten),
    "Reshape": LayerType(_reshape),
    "Crop": LayerType(_crop),
    "Split": LayerType(_split),
    **{
        kind: LayerType(_scalar)
        for kind in (
            *("Accuracy", "ContrastiveLoss", "EuclideanLoss", "HingeLoss", "InfogainLoss"),
            *("MultinomialLogisticLoss", "SigmoidCrossEntropyLoss", "SoftmaxWithLoss"),
        )
    },
}
"""By LayerParameter.type."""
