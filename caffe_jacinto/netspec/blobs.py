"""The blobs that a network's layers have by its prototxt: shapes, as far as the text alone tells them."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

Dims = tuple[int | None, ...]
"""A shape; None where the text does not tell (for one, the channels of the images in an LMDB)."""

TRAIN, TEST = 0, 1
"""The phases, as both schemas number them."""

_SAME_SHAPE = frozenset(
    [
        "AbsVal",
        "BatchNorm",
        "Bias",
        "BNLL",
        "Dropout",
        "Eltwise",
        "ELU",
        "Exp",
        "Log",
        "LRN",
        "MVN",
        "Power",
        "PReLU",
        "ReLU",
        "Scale",
        "Sigmoid",
        "Softmax",
        "Split",
        "TanH",
    ]
)


def expected_blobs(net: Any, *, test: bool = False) -> dict[str, list[Dims]]:
    """The shapes of the blobs of each layer with weights, in the TRAIN phase or in the TEST phase.

    ``net`` is a NetParameter message of either dialect. Covered are Convolution, Deconvolution, InnerProduct,
    BatchNorm (with the fork's ``scale_bias``: five blobs), Scale, Bias and PReLU with one bottom.
    """
    shapes = _declared_inputs(net)
    blobs: dict[str, list[Dims]] = {}
    for layer in net.layer:
        if not in_phase(layer, TEST if test else TRAIN):
            continue
        bottoms = [shapes.get(name, ()) for name in layer.bottom]
        first = bottoms[0] if bottoms else ()
        own = _BLOBS[layer.type](layer, first) if layer.type in _BLOBS and len(bottoms) == 1 else []
        if own:
            blobs[layer.name] = own
        for name in layer.top:
            shapes[name] = _top_shape(layer, bottoms)
    return blobs


def _declared_inputs(net: Any) -> dict[str, Dims]:
    """The network's own ``input`` fields, the older form of an Input layer."""
    dims = [tuple(shape.dim) for shape in net.input_shape]
    if not dims:
        numbers = list(net.input_dim)
        dims = [tuple(numbers[at : at + 4]) for at in range(0, len(numbers), 4)]
    return dict(zip(net.input, dims, strict=False))


def in_phase(layer: Any, phase: int) -> bool:
    """Whether a layer (a LayerParameter message) takes part in ``phase``, by its own rules."""
    rules = [rule for rule in layer.include if rule.HasField("phase")]
    if rules:
        return any(rule.phase == phase for rule in rules)
    return not any(rule.HasField("phase") and rule.phase == phase for rule in layer.exclude)


def _channels(shape: Dims) -> int | None:
    return shape[1] if len(shape) > 1 else None


def height_width(parameters: Any, name: str, default: int) -> tuple[int, int]:
    """Height and width of a convolution's or pooling's kernel_size, stride or pad, however written."""
    short = name.removesuffix("_size")
    if parameters.HasField(f"{short}_h"):
        return getattr(parameters, f"{short}_h"), getattr(parameters, f"{short}_w")
    values = getattr(parameters, name)
    if isinstance(values, int):  # pooling's fields are not repeated
        return (values, values) if parameters.HasField(name) else (default, default)
    listed = list(values) or [default]
    return listed[0], listed[-1]


def _convolution_blobs(layer: Any, bottom: Dims) -> list[Dims]:
    parameters = layer.convolution_param
    channels = _channels(bottom)
    inputs = None if channels is None or not parameters.group else channels // parameters.group
    outputs = parameters.num_output
    weights: Dims = (outputs, inputs, *height_width(parameters, "kernel_size", 1))
    return [weights, (outputs,)] if parameters.bias_term else [weights]


def _deconvolution_blobs(layer: Any, bottom: Dims) -> list[Dims]:
    parameters = layer.convolution_param
    outputs = parameters.num_output
    weights: Dims = (
        _channels(bottom),
        outputs // max(parameters.group, 1),
        *height_width(parameters, "kernel_size", 1),
    )
    return [weights, (outputs,)] if parameters.bias_term else [weights]


def _inner_product_blobs(layer: Any, bottom: Dims) -> list[Dims]:
    parameters = layer.inner_product_param
    weights: Dims = (parameters.num_output, _count(bottom[1:]))
    if parameters.transpose:
        weights = weights[::-1]
    return [weights, (parameters.num_output,)] if parameters.bias_term else [weights]


def _batch_norm_blobs(layer: Any, bottom: Dims) -> list[Dims]:
    channels: Dims = (_channels(bottom),)
    statistics = [channels, channels, (1,)]
    parameters = layer.batch_norm_param
    return [*statistics, channels, channels] if getattr(parameters, "scale_bias", False) else statistics


def _scale_blobs(layer: Any, bottom: Dims) -> list[Dims]:
    channels: Dims = (_channels(bottom),)
    return [channels, channels] if layer.scale_param.bias_term else [channels]


_BLOBS: dict[str, Callable[[Any, Dims], list[Dims]]] = {
    "Convolution": _convolution_blobs,
    "Deconvolution": _deconvolution_blobs,
    "InnerProduct": _inner_product_blobs,
    "BatchNorm": _batch_norm_blobs,
    "Scale": _scale_blobs,
    "Bias": lambda layer, bottom: [(_channels(bottom),)],
    "PReLU": lambda layer, bottom: [() if layer.prelu_param.channel_shared else (_channels(bottom),)],
}


def _count(dims: Dims) -> int | None:
    known = [dim for dim in dims if dim is not None]
    return prod(known) if dims and len(known) == len(dims) else None


def _top_shape(layer: Any, bottoms: list[Dims]) -> Dims:
    """The shape of a layer's tops; () where the text does not tell."""
    first = bottoms[0] if bottoms else ()
    if layer.type == "Input" and layer.input_param.shape:
        return tuple(layer.input_param.shape[0].dim)
    if not bottoms:
        crop = layer.transform_param.crop_size or None
        return (None, None, crop, crop)
    if layer.type == "Convolution":
        return (None, layer.convolution_param.num_output, *_convolved(layer.convolution_param, first))
    if layer.type == "Pooling":
        return (None, _channels(first), *_pooled(layer.pooling_param, first))
    if layer.type == "InnerProduct":
        return (None, layer.inner_product_param.num_output)
    if layer.type == "Flatten":
        return (None, _count(first[1:]))
    if layer.type == "Concat" and layer.concat_param.axis == 1:
        channels = [_channels(bottom) for bottom in bottoms]
        known = [number for number in channels if number is not None]
        return (None, sum(known) if len(known) == len(channels) else None, *first[2:])
    return first if layer.type in _SAME_SHAPE else ()


def _convolved(parameters: Any, bottom: Dims) -> Dims:
    kernel, stride = height_width(parameters, "kernel_size", 1), height_width(parameters, "stride", 1)
    pad = height_width(parameters, "pad", 0)
    dilation = list(parameters.dilation) or [1]
    reach = [
        (size - 1) * spread + 1 for size, spread in zip(kernel, (dilation[0], dilation[-1]), strict=True)
    ]
    return tuple(
        None if size is None or not stride[axis] else (size + 2 * pad[axis] - reach[axis]) // stride[axis] + 1
        for axis, size in enumerate(bottom[2:4])
    )


def _pooled(parameters: Any, bottom: Dims) -> Dims:
    if parameters.global_pooling:
        return (1, 1)
    kernel, stride = height_width(parameters, "kernel_size", 1), height_width(parameters, "stride", 1)
    pad = height_width(parameters, "pad", 0)
    down = getattr(parameters, "round_mode", None) == 1  # FLOOR; the fork has no such field
    sizes: list[int | None] = []
    for axis, size in enumerate(bottom[2:4]):
        if size is None or not stride[axis]:
            sizes.append(None)
            continue
        room = size + 2 * pad[axis] - kernel[axis]
        pooled = (room // stride[axis] if down else -(-room // stride[axis])) + 1
        # Caffe drops a last window that would start in the padding.
        if any(pad) and (pooled - 1) * stride[axis] >= size + pad[axis]:
            pooled -= 1
        sizes.append(pooled)
    return tuple(sizes)
