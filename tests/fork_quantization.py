"""What caffe-jacinto's own quantized test computes, in NumPy with 64-bit numbers, apart from the package.

Each blob's least and largest value after a pass, times 1.25, go into a moving average (the first pass whole,
then 0.01 of each); from pass 1 on, values are rounded on the grid of the average so far. Weights have 12 bits
and an offset that is not rounded, activations 8 bits and none, biases 16 bits and no limits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

WEIGHTED = ("Convolution", "Deconvolution", "InnerProduct")
ROUNDED = (*WEIGHTED, *("BatchNorm", "Scale", "Bias", "ReLU", "PReLU", "Pooling", "Eltwise", "Concat"))
MERGED = {
    **dict.fromkeys(WEIGHTED, ("BatchNorm", "Scale", "ReLU")),
    "BatchNorm": ("Scale", "ReLU"),
    "Scale": ("ReLU",),
}


Blobs = dict[str, list[Values]]


def passes(net: Any, blobs: Blobs | list[Blobs], batches: list[Values]) -> dict[str, Values]:
    """The blobs after the last of several passes; ``net`` is in caffe-jacinto's dialect.

    ``blobs``: its weights, or those of each pass.
    """
    of_each = blobs if isinstance(blobs, list) else [blobs] * len(batches)
    averages: dict[str, tuple[float, float]] = {}
    found: dict[str, Values] = {}
    for number, (images, exact) in enumerate(zip(batches, of_each, strict=True)):
        quantized = number >= 1
        rounded = {layer.name: _rounded_blobs(layer, exact.get(layer.name, [])) for layer in net.layer}
        found = {}
        for at, layer in enumerate(net.layer):
            if layer.type == "Input":
                top = images
            else:
                own = (rounded if quantized else exact).get(layer.name, [])
                top = _computed(layer, own, [found[name] for name in layer.bottom])
            data = layer.type == "Input"
            if quantized and (data or (layer.type in ROUNDED and not _is_merged(net.layer, at))):
                top = _activations(top, *averages[layer.top[0]])
            found[layer.top[0]] = top
        for name, values in found.items():
            seen = values.min() * 1.25, values.max() * 1.25
            old = averages.get(name)
            averages[name] = (
                seen if old is None else (0.99 * old[0] + 0.01 * seen[0], 0.99 * old[1] + 0.01 * seen[1])
            )
    return found


def _is_merged(layers: Any, at: int) -> bool:
    after = _readers(layers, at)
    if len(after) != 1:
        return False
    layer, follower = layers[at], layers[after[0]].type
    if follower in MERGED.get(layer.type, ()):
        return True
    if layer.type in ("BatchNorm", "Scale") and follower in WEIGHTED:
        before = [i for i in range(at) if layer.bottom[0] in layers[i].top][-1]
        return layers[before].type not in WEIGHTED
    return False


def _readers(layers: Any, at: int) -> list[int]:
    (top,) = layers[at].top
    found = []
    for number in range(at + 1, len(layers)):
        if top in layers[number].bottom:
            found.append(number)
        if top in layers[number].top:
            break
    return found


def _activations(values: Values, low: float, high: float) -> Values:
    if low >= 0:
        scale, ends = 255 / max(abs(low), abs(high)), (0, 255)
    else:
        scale, ends = 127 / max(abs(low), abs(high)), (-128, 127)
    return np.rint(np.clip(values * scale, *ends)) / scale


def _rounded_blobs(layer: Any, blobs: list[Values]) -> list[Values]:
    if layer.type not in WEIGHTED:
        return blobs
    weights, *bias = blobs
    low, high = weights.min(), weights.max()
    scale = 4095 / (high - low)
    offset = -low * scale
    result = [(np.rint(np.clip(weights * scale + offset, 0, 4095)) - offset) / scale]
    for values in bias:
        most = 65535 if values.min() >= 0 else 32767
        step = np.abs(values).max() / most
        result.append(np.rint(values / step) * step)
    return result


def _computed(layer: Any, blobs: list[Values], given: list[Values]) -> Values:
    values = given[0]
    if layer.type == "Convolution":
        return _convolved(values, blobs, layer.convolution_param)
    if layer.type == "InnerProduct":
        flat: Values = values.reshape(len(values), -1) @ blobs[0].T + blobs[1]
        return flat
    if layer.type == "BatchNorm":
        mean, variance, _, gain, shift = (blob.reshape(1, -1, 1, 1) for blob in blobs)
        normed: Values = (values - mean) / np.sqrt(variance + layer.batch_norm_param.eps) * gain + shift
        return normed
    if layer.type == "ReLU":
        return np.maximum(values, 0)
    if layer.type == "Eltwise":
        return given[0] + given[1]
    if layer.type == "Concat":
        return np.concatenate(given, axis=1)
    assert layer.type == "Pooling"
    if layer.pooling_param.global_pooling:
        means: Values = values.mean(axis=(2, 3), keepdims=True)
        return means
    count, channels, height, width = values.shape
    largest: Values = values.reshape(count, channels, height // 2, 2, width // 2, 2).max(axis=(3, 5))
    return largest


def _convolved(values: Values, blobs: list[Values], parameters: Any) -> Values:
    weights = blobs[0]
    pad, groups = parameters.pad[0], parameters.group
    padded = np.pad(values, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weights.shape[2:], axis=(2, 3))
    parts = [
        np.einsum("nchwij,ocij->nohw", taken, own)
        for taken, own in zip(np.split(windows, groups, axis=1), np.split(weights, groups), strict=True)
    ]
    result: Values = np.concatenate(parts, axis=1) + (blobs[1].reshape(1, -1, 1, 1) if len(blobs) > 1 else 0)
    return result
