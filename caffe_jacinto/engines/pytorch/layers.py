"""Caffe's layers on PyTorch: one table, from a layer's type to the function that builds it.

A builder reads the layer's message, makes its blobs and returns the function that computes its tops from the
blobs and the bottoms. The shapes of blobs and tops come from netspec/layer_types.py. Definitions: Caffe's
schema (caffe.proto) and its layers; the tests compare each with pycaffe.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor

from caffe_jacinto.engines.pytorch.batch_norm import batch_norm
from caffe_jacinto.engines.pytorch.convolutions import Convolution, Geometry
from caffe_jacinto.engines.pytorch.layer_setup import Blobs, Forward, LayerSetup, Shape, fill
from caffe_jacinto.engines.pytorch.loss import accuracy, softmax_with_loss
from caffe_jacinto.netspec.layer_types import geometry, is_known, output_shapes
from caffe_jacinto.prototxt.solver import TRAIN


def pooling(layer: LayerSetup) -> Forward:
    layer.takes(1)
    fields = layer.parameters(
        "pooling_param",
        *("pool", "pad", "pad_h", "pad_w", "kernel_size", "kernel_h", "kernel_w"),
        *("stride", "stride_h", "stride_w", "global_pooling", "round_mode"),
    )
    (shape,) = layer.bottoms
    if len(shape) != 4:
        layer.refuse("pools batch x channels x height x width only")
    kinds = type(fields)
    if fields.pool not in (kinds.MAX, kinds.AVE):
        layer.refuse("pooling_param.pool: only MAX and AVE are supported")
    largest = fields.pool == kinds.MAX
    if fields.global_pooling:
        size = shape[2:]
        if largest:
            return lambda blobs, images: F.max_pool2d(images, size)
        return lambda blobs, images: images.mean((2, 3), keepdim=True)
    kernel, stride, pad, _ = geometry(layer.tree)
    if min(*kernel, *stride) < 1 or pad[0] >= kernel[0] or pad[1] >= kernel[1]:
        layer.refuse("kernel and stride have to be at least 1, and pad smaller than the kernel")
    up = getattr(fields, "round_mode", 0) == 0
    sizes = layer.tops[0][2:]
    if any((sizes[i] - 1) * stride[i] >= shape[i + 2] + pad[i] for i in (0, 1)) or min(sizes) < 1:
        layer.refuse(
            f"a window of {kernel[0]}x{kernel[1]} lies outside of the {shape[2]}x{shape[3]} pixels; "
            "use a smaller stride or kernel"
        )
    # On a GPU, PyTorch divides a window over the edge by another number.
    by_pytorch = largest or layer.device.type == "cpu"
    if up and 2 * pad[0] <= kernel[0] and 2 * pad[1] <= kernel[1] and by_pytorch:
        if largest:
            return lambda blobs, images: F.max_pool2d(images, kernel, stride, pad, ceil_mode=True)
        return lambda blobs, images: F.avg_pool2d(images, kernel, stride, pad, ceil_mode=True)
    edges = tuple(
        _edges(shape[i + 2], kernel[i], stride[i], pad[i], sizes[i]) for i in (1, 0)
    )  # width first, as F.pad has it
    margins = [*edges[0], *edges[1]]
    if largest:
        return lambda blobs, images: F.max_pool2d(F.pad(images, margins, value=float("-inf")), kernel, stride)
    areas = _areas(shape[2:], kernel, stride, pad, sizes).to(layer.device)

    def average(blobs: Blobs, images: Tensor) -> Tensor:
        sums = F.avg_pool2d(F.pad(images, margins), kernel, stride, divisor_override=1)
        return sums / areas.to(sums.dtype)

    return average


def _edges(size: int, kernel: int, stride: int, pad: int, pooled: int) -> tuple[int, int]:
    """The padding before and behind that makes the windows fill an axis exactly; negative: cut off."""
    return pad, (pooled - 1) * stride + kernel - size - pad


def _areas(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pad: tuple[int, ...],
    pooled: tuple[int, ...],
) -> Tensor:
    """What each window's sum is divided by: its pixels, those of the padding too, but none beyond it."""
    spans = []
    for i in (0, 1):
        starts = torch.arange(pooled[i]) * stride[i] - pad[i]
        spans.append((starts + kernel[i]).clamp(max=size[i] + pad[i]) - starts)
    return spans[0][:, None] * spans[1][None, :]


def convolution(layer: LayerSetup) -> Forward:
    convolve = convolution_of(layer)
    return lambda blobs, images: convolve(images, *with_bias(blobs))


def convolution_of(layer: LayerSetup) -> Convolution:
    """The convolution of a layer, whose blobs are made."""
    layer.takes(1)
    fields = layer.parameters(
        "convolution_param",
        *("num_output", "bias_term", "pad", "pad_h", "pad_w", "kernel_size", "kernel_h", "kernel_w"),
        *("stride", "stride_h", "stride_w", "dilation", "group", "weight_filler", "bias_filler", "axis"),
    )
    (shape,) = layer.bottoms
    if len(shape) != 4 or layer.axis(fields.axis) != 1:
        layer.refuse("convolves batch x channels x height x width only (axis 1)")
    kernel, stride, pad, dilation = geometry(layer.tree)
    outputs, group = fields.num_output, fields.group
    if min(*kernel, *stride, *dilation, outputs, group) < 1 or shape[1] % group or outputs % group:
        layer.refuse(
            f"{shape[1]} channels to {outputs} outputs in {group} groups by {kernel[0]}x{kernel[1]} kernels: "
            "sizes have to be at least 1, and channels and outputs multiples of group"
        )
    if min(layer.tops[0]) < 1:
        layer.refuse(f"its kernel is larger than the {shape[2]}x{shape[3]} pixels that it is given")
    layer.blob(fields.weight_filler)
    if fields.bias_term:
        layer.blob(fields.bias_filler)
    return Convolution(Geometry(stride, pad, dilation, group))


def with_bias(blobs: Blobs) -> tuple[Tensor, Tensor | None]:
    """Weights, and the bias if there is one."""
    return blobs[0], blobs[1] if len(blobs) > 1 else None


def inner_product(layer: LayerSetup) -> Forward:
    layer.takes(1)
    fields = layer.parameters(
        "inner_product_param",
        *("num_output", "bias_term", "weight_filler", "bias_filler", "axis", "transpose"),
    )
    (shape,) = layer.bottoms
    axis = layer.axis(fields.axis)
    inputs, transposed = prod(shape[axis:]), fields.transpose
    if fields.num_output < 1:
        layer.refuse("inner_product_param.num_output has to be at least 1")
    layer.blob(fields.weight_filler)
    if fields.bias_term:
        layer.blob(fields.bias_filler)

    def forward(blobs: Blobs, values: Tensor) -> Tensor:
        flat = values.reshape(*values.shape[:axis], inputs)
        weights, bias = with_bias(blobs)
        return F.linear(flat, weights.T if transposed else weights, bias)

    return forward


def relu(layer: LayerSetup) -> Forward:
    layer.takes(1)
    slope = layer.parameters("relu_param", "negative_slope").negative_slope
    if slope:
        return lambda blobs, values: F.leaky_relu(values, slope)
    return lambda blobs, values: torch.relu(values)


def prelu(layer: LayerSetup) -> Forward:
    layer.takes(1)
    fields = layer.parameters("prelu_param", "filler", "channel_shared")
    (shape,) = layer.bottoms
    if len(shape) < 2:
        layer.refuse("needs a bottom with channels")
    layer.blob(fields.filler if fields.HasField("filler") else None, constant=0.25)
    return lambda blobs, values: F.prelu(values, blobs[0].to(values.dtype).reshape(-1))


def power(layer: LayerSetup) -> Forward:
    layer.takes(1)
    fields = layer.parameters("power_param", "power", "scale", "shift")
    exponent, scale, shift = fields.power, fields.scale, fields.shift

    def forward(blobs: Blobs, values: Tensor) -> Tensor:
        if scale != 1:
            values = values * scale
        if shift:
            values = values + shift
        return values if exponent == 1 else values.pow(exponent)

    return forward


def bias(layer: LayerSetup) -> Forward:
    layer.takes(1, 2)
    fields = layer.parameters("bias_param", "axis", "num_axes", "filler")
    spread = _spread(layer, fields.axis, fields.num_axes)
    if len(layer.bottoms) == 2:
        return lambda blobs, values, added: values + added.reshape(spread)
    layer.blob(fields.filler)
    return lambda blobs, values: values + blobs[0].reshape(spread)


def scale(layer: LayerSetup) -> Forward:
    layer.takes(1, 2)
    fields = layer.parameters("scale_param", "axis", "num_axes", "filler", "bias_term", "bias_filler")
    spread = _spread(layer, fields.axis, fields.num_axes)
    if len(layer.bottoms) == 1:
        layer.blob(fields.filler if fields.HasField("filler") else None, constant=1.0)
    if fields.bias_term:
        layer.blob(fields.bias_filler)
    shifts = fields.bias_term

    def forward(blobs: Blobs, values: Tensor, *given: Tensor) -> Tensor:
        factors = given[0] if given else blobs[0]
        values = values * factors.reshape(spread)
        return values + blobs[-1].reshape(spread) if shifts else values

    return forward


def _spread(layer: LayerSetup, axis: int, axes: int) -> Shape:
    """The shape of what a Bias or Scale applies, with 1s for the axes that it repeats along."""
    shape = layer.bottoms[0]
    start = layer.axis(axis)
    if len(layer.bottoms) == 2:
        size = layer.bottoms[1]
        if not size:
            return (1,) * len(shape)
    elif axes == 0:
        return (1,) * len(shape)
    else:
        size = shape[start:] if axes == -1 else shape[start : start + axes]
    end = start + len(size)
    if shape[start:end] != size or (len(layer.bottoms) == 1 and axes > 0 and len(size) != axes):
        layer.refuse(f"what it applies from axis {axis} on does not match its bottom's shape {shape}")
    return (1,) * start + size + (1,) * (len(shape) - end)


def lrn(layer: LayerSetup) -> Forward:
    """Across channels, or within each: y = x / (k + alpha/n x the sum of n squares) ^ beta."""
    layer.takes(1)
    fields = layer.parameters("lrn_param", "local_size", "alpha", "beta", "k", "norm_region")
    size, alpha, beta = fields.local_size, fields.alpha, fields.beta
    if size % 2 == 0:
        layer.refuse(f"lrn_param.local_size {size} has to be odd")
    half = (size - 1) // 2
    (shape,) = layer.bottoms
    if len(shape) != 4:
        layer.refuse("normalizes batch x channels x height x width only")
    if fields.norm_region == type(fields).WITHIN_CHANNEL:
        # Caffe builds this of its pooling and power layers, and so passes over k: it is 1.
        def within(blobs: Blobs, values: Tensor) -> Tensor:
            squares = F.avg_pool2d(values.float().square(), size, 1, half)
            return values * torch.pow(1 + alpha * squares, -beta)

        return within
    channels = shape[1]

    def across(blobs: Blobs, values: Tensor) -> Tensor:
        squares = F.pad(values.float().square(), (0, 0, 0, 0, half, half))
        total = squares[:, :channels]
        for offset in range(1, size):
            total = total + squares[:, offset : offset + channels]
        return values * torch.pow(total * (alpha / size) + fields.k, -beta)

    return across


def dropout(layer: LayerSetup) -> Forward:
    layer.takes(1)
    ratio = layer.parameters("dropout_param", "dropout_ratio").dropout_ratio
    if not 0 <= ratio < 1:
        layer.refuse(f"dropout_param.dropout_ratio {ratio:g} has to be from 0 to below 1")
    if layer.phase != TRAIN or ratio == 0:
        return lambda blobs, values: values
    layer.draws = True
    return lambda blobs, values: F.dropout(values, ratio)


def eltwise(layer: LayerSetup) -> Forward:
    layer.takes(2, len(layer.bottoms))
    fields = layer.parameters("eltwise_param", "operation", "coeff", "stable_prod_grad")
    if len(set(layer.bottoms)) > 1:
        layer.refuse(f"its bottoms have different shapes: {', '.join(map(str, layer.bottoms))}")
    kinds = type(fields)
    factors = list(fields.coeff)
    if factors and (len(factors) != len(layer.bottoms) or fields.operation != kinds.SUM):
        layer.refuse("eltwise_param.coeff goes with SUM, one for each bottom")
    if fields.operation == kinds.SUM:
        return _weighted_sum(factors)
    combine = torch.mul if fields.operation == kinds.PROD else torch.maximum
    return lambda blobs, first, *others: _folded(combine, first, others)


def _weighted_sum(factors: list[float]) -> Forward:
    def forward(blobs: Blobs, *values: Tensor) -> Tensor:
        if not factors or all(factor == 1 for factor in factors):
            return _folded(torch.add, values[0], values[1:])
        terms = [value * factor for value, factor in zip(values, factors, strict=True)]
        return _folded(torch.add, terms[0], tuple(terms[1:]))

    return forward


def _folded(combine: Callable[[Tensor, Tensor], Tensor], first: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    for other in others:
        first = combine(first, other)
    return first


def concat(layer: LayerSetup) -> Forward:
    layer.takes(1, max(len(layer.bottoms), 1))
    fields = layer.parameters("concat_param", "axis", "concat_dim")
    axis = fields.concat_dim if fields.HasField("concat_dim") else layer.axis(fields.axis)
    rests = {(*shape[:axis], *shape[axis + 1 :]) for shape in layer.bottoms}
    if len(rests) > 1 or axis >= len(layer.bottoms[0]):
        layer.refuse(f"its bottoms differ in more than axis {axis}: {', '.join(map(str, layer.bottoms))}")
    return lambda blobs, *values: torch.cat(values, axis)


def flatten(layer: LayerSetup) -> Forward:
    layer.takes(1)
    fields = layer.parameters("flatten_param", "axis", "end_axis")
    start, end = layer.axis(fields.axis), layer.axis(fields.end_axis)
    if end < start:
        layer.refuse("flatten_param.end_axis lies before axis")
    return lambda blobs, values: values.flatten(start, end)


def reshape(layer: LayerSetup) -> Forward:
    layer.takes(1)
    fields = layer.parameters("reshape_param", "shape", "axis", "num_axes")
    (shape,) = layer.bottoms
    axes = len(shape)
    start = fields.axis if fields.axis >= 0 else axes + fields.axis + 1
    end = axes if fields.num_axes == -1 else start + fields.num_axes
    if not 0 <= start <= end <= axes:
        layer.refuse(f"reshape_param.axis {fields.axis} and num_axes {fields.num_axes} leave the {axes} axes")
    if not is_known(output_shapes(layer.tree, layer.bottoms, 1)[0]) or min(layer.tops[0], default=1) < 1:
        given, values = list(fields.shape.dim), shape[start:end]
        layer.refuse(f"reshape_param.shape {given} does not hold the {prod(values)} values of {values}")
    result = layer.tops[0]
    # The batch may be smaller than in the file when the last one of a pass is.
    kept = start > 0
    return lambda blobs, values: values.reshape((values.shape[0], *result[1:]) if kept else result)


def softmax(layer: LayerSetup) -> Forward:
    layer.takes(1)
    axis = layer.axis(layer.parameters("softmax_param", "axis").axis)
    return lambda blobs, values: F.softmax(values.float(), axis)


def dummy_data(layer: LayerSetup) -> Forward:
    """Constant tops are made once; others are drawn again for every pass, as in Caffe."""
    layer.takes(0, tops=len(layer.message.top))
    fields = layer.parameters(
        "dummy_data_param", "shape", "data_filler", "num", "channels", "height", "width"
    )
    count = len(layer.message.top)
    if len(fields.shape or fields.num) not in (1, count) or len(fields.data_filler) not in (0, 1, count):
        layer.refuse("dummy_data_param: give one shape and filler, or one for each top")
    shapes = layer.tops
    fillers = list(fields.data_filler) or [type(fields)().data_filler.add()]
    fillers = fillers * count if len(fillers) == 1 else fillers
    generator, device, where = layer.generator, layer.device, layer.where

    def drawn(index: int) -> Tensor:
        return fill(shapes[index], fillers[index], generator, where).to(device)

    constants = {i: drawn(i) for i, filler in enumerate(fillers) if filler.type == "constant"}
    layer.draws = len(constants) < count
    return lambda blobs: tuple(constants[i] if i in constants else drawn(i) for i in range(count))


LAYERS: dict[str, Callable[[LayerSetup], Forward]] = {
    "Accuracy": accuracy,
    "BatchNorm": batch_norm,
    "Bias": bias,
    "Concat": concat,
    "Convolution": convolution,
    "Dropout": dropout,
    "DummyData": dummy_data,
    "Eltwise": eltwise,
    "Flatten": flatten,
    "InnerProduct": inner_product,
    "LRN": lrn,
    "Pooling": pooling,
    "Power": power,
    "PReLU": prelu,
    "ReLU": relu,
    "Reshape": reshape,
    "Scale": scale,
    "Softmax": softmax,
    "SoftmaxWithLoss": softmax_with_loss,
}
"""By LayerParameter.type. Data and Input layers have no function: their tops are given to the net."""
