"""A quantized network computed with integers alone, as a processor does: slow, plain, apart from the package.

It reads quantization.json and the folded weights. A convolution multiplies 8-bit numbers, sums in 32 bits,
and brings each sum to the scale of its output by a 31-bit factor and a shift, rounded to the nearest, halves
to the even one. What is not a convolution has factors of the same kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


def by_integers(
    unit: dict[str, Any], layers: dict[str, Any], given: list[tuple[Numbers, float]], images: NDArray[Any]
) -> Numbers:
    """The numbers that one unit of the network gives.

    Args:
        unit: its entry in quantization.json.
        layers: the network's layers by name, with a message and blobs each, in stock Caffe's dialect.
        given: the numbers that it reads, each with their scale; of an input, none.
        images: what an input reads.
    """
    output = unit["output"]
    if unit["type"] == "Input":
        numbers: Numbers = np.clip(np.rint(images / output["scale"][0]), *output["limits"]).astype(np.int64)
        return numbers
    members = [layers[name] for name in unit["layers"]]
    if unit["keeps_scale"]:
        return _kept(members[0].message, given[0][0])
    limited: Numbers = np.clip(_computed(unit, members, given, output["scale"][0]), *output["limits"])
    return limited


def _computed(
    unit: dict[str, Any], members: list[Any], given: list[tuple[Numbers, float]], scale: float
) -> Numbers:
    message, values = members[0].message, given[0][0]
    kind = unit["type"]
    if kind in ("Convolution", "InnerProduct"):
        assert {member.type for member in members[1:]} <= {"ReLU"}
        sums, factors = _sums(unit, members[0], given[0])
        return requantized(sums, factors / scale)
    if kind == "Eltwise":
        assert message.eltwise_param.operation == message.eltwise_param.SUM
        assert not message.eltwise_param.coeff
        return requantized(
            np.stack([numbers for numbers, _ in given]), np.array([step / scale for _, step in given]), axis=0
        ).astype(np.int64)
    if kind == "Pooling":
        assert message.pooling_param.global_pooling
        sums = values.sum(axis=(2, 3), keepdims=True)
        return requantized(sums, np.array([given[0][1] / scale / (values.shape[2] * values.shape[3])]))
    factor, shift = _affine(members)
    ones = np.ones_like(values)
    return requantized(
        np.stack([values, ones]), np.stack([factor * given[0][1] / scale, shift / scale]), axis=0
    )


def requantized(numbers: Numbers, factors: NDArray[np.float64], axis: int | None = None) -> Numbers:
    """``numbers`` times ``factors``, rounded; the factors are 31-bit integers with a common shift.

    ``factors``: one, or one for each channel (axis 1). With ``axis``, products are summed along it first.
    """
    bits = 30 - int(np.ceil(np.log2(np.abs(factors).max())))
    whole = np.rint(factors * 2.0**bits).astype(np.int64)
    assert np.abs(whole).max() < 2**31
    if axis is not None:
        whole = whole.reshape(len(numbers), *_channels(whole.reshape(len(numbers), -1)[0], numbers[0].ndim))
        products = (numbers * whole).sum(axis=axis)
    else:
        products = numbers * whole.reshape(_channels(whole, numbers.ndim))
    half = 1 << (bits - 1)
    result: Numbers = (products + half) >> bits
    tied = (products & ((1 << bits) - 1)) == half
    return result - (tied & (result & 1 == 1))


def _channels(factors: Any, axes: int) -> tuple[int, ...]:
    return (1,) * axes if factors.size == 1 else (1, factors.size, *(1,) * (axes - 2))


def _sums(
    unit: dict[str, Any], layer: Any, given: tuple[Numbers, float]
) -> tuple[Numbers, NDArray[np.float64]]:
    """The 32-bit sums of a convolution or inner product, and what 1 of each channel's stands for."""
    values, step = given
    weights = layer.blobs[0]
    scales = np.array(unit["weights"]["scale"], np.float32)
    spread = scales.reshape(-1, *[1] * (weights.ndim - 1))
    whole = np.clip(np.rint(weights / spread), *unit["weights"]["limits"]).astype(np.int8)
    factors = scales.astype(np.float64) * step
    if layer.type == "Convolution":
        sums = convolved(values, whole, layer.message.convolution_param)
    else:
        sums = values.reshape(len(values), -1).astype(np.int32) @ whole.astype(np.int32).T
    if len(layer.blobs) > 1:
        bias = np.rint(layer.blobs[1].astype(np.float64) / np.array(unit["bias"]["scale"]))
        # The bias's scale is that of the sums, or a power of two times it.
        bias = np.clip(bias, *unit["bias"]["limits"]) * np.rint(np.array(unit["bias"]["scale"]) / factors)
        sums = sums + bias.astype(np.int64).reshape(1, -1, *[1] * (sums.ndim - 2))
    assert np.abs(sums).max() < 2**31
    return sums.astype(np.int64), factors


def convolved(values: Numbers, weights: NDArray[np.int8], parameters: Any) -> NDArray[np.int32]:
    """The sums of a convolution's products."""
    kernel = weights.shape[2:]
    pad = parameters.pad[0] if parameters.pad else 0
    stride = parameters.stride[0] if parameters.stride else 1
    assert not list(parameters.dilation) or set(parameters.dilation) == {1}
    padded = np.pad(values, ((0, 0), (0, 0), (pad, pad), (pad, pad))).astype(np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=(2, 3))[:, :, ::stride, ::stride]
    results = []
    groups = parameters.group
    inputs, outputs = values.shape[1] // groups, len(weights) // groups
    for group in range(groups):
        taken = windows[:, group * inputs : (group + 1) * inputs].transpose(0, 2, 3, 1, 4, 5)
        rows = np.ascontiguousarray(taken).reshape(*taken.shape[:3], -1)
        part = weights[group * outputs : (group + 1) * outputs].reshape(outputs, -1).astype(np.int32)
        results.append((rows @ part.T).transpose(0, 3, 1, 2))
    return np.concatenate(results, axis=1)


def _affine(members: list[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What Power, BatchNorm and Scale layers compute of each channel: a factor and what is added."""
    factor, shift = np.ones(1), np.zeros(1)
    for member in members:
        values = [blob.astype(np.float64).reshape(-1) for blob in member.blobs]
        if member.type == "Power":
            settings = member.message.power_param
            assert settings.power == 1
            gain, added = np.array([settings.scale]), np.array([settings.shift])
        elif member.type == "BatchNorm":
            gain = 1 / np.sqrt(values[1] + member.message.batch_norm_param.eps)
            added = -values[0] * gain
        elif member.type == "Scale":
            gain, added = values[0], values[1]
        else:
            assert member.type == "ReLU"
            continue
        factor, shift = factor * gain, shift * gain + added
    return factor, shift


def _kept(message: Any, values: Numbers) -> Numbers:
    """Largest numbers of windows, or the same numbers in another shape."""
    if message.type in ("Dropout", "Split"):
        return values
    assert message.type == "Pooling"
    settings = message.pooling_param
    size, stride, pad = settings.kernel_size, settings.stride, settings.pad
    assert not pad
    rooms = [-(-(side - size) // stride) * stride + size - side for side in values.shape[2:]]
    lowest = np.iinfo(np.int64).min
    padded = np.pad(values, ((0, 0), (0, 0), (0, rooms[0]), (0, rooms[1])), constant_values=lowest)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
    largest: Numbers = windows[:, :, ::stride, ::stride].max(axis=(4, 5))
    return largest
