"""Batch norms, scales and input biases folded into the convolutions and inner products beside them.

What comes out is for stock Caffe and for OpenCV 4's reader of Caffe files, which knows no Bias layer. A
folded layer computes ``gain * (w x + b) + shift``, so that its weights become ``gain * w`` and its bias
``gain * b + shift``: zero weights stay zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.caffemodel.net_file import NewLayer, net_parts
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.export.stock_net import StockLayer, StockNet, stock_net
from caffe_jacinto.prototxt.dialects import Dialect

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]

_WEIGHTED = ("Convolution", "InnerProduct")


@dataclass
class Merged:
    """The network after merging, and what was done."""

    net: StockNet
    merged: dict[str, list[str]] = field(default_factory=dict)
    """The layers that each convolution or inner product took in, by its name."""

    left: list[str] = field(default_factory=list)
    """A line for each batch norm that stays and for each bias that is said in another way: which, and why."""

    def deploy(self) -> str:
        """The deploy prototxt, for stock Caffe."""
        return self.net.text()

    def weight_bytes(self) -> bytes:
        """The weight file that goes with it."""
        return b"".join(self._parts())

    def write(self, deploy: Path, weights: Path) -> None:
        """Write both files, each whole or not at all."""
        write_whole(weights, self._parts())
        write_whole(deploy, self.deploy())

    def _parts(self) -> Any:
        layers = [NewLayer(layer.message, layer.blobs) for layer in self.net.layers]
        return net_parts(self.net.message.name, layers, Dialect.BVLC)


def merge_bn(deploy_text: str, where: str, dialect: Dialect | None, weights: Path) -> Merged:
    """The deploy network ``deploy_text`` with all that can be folded exactly folded into its convolutions.

    ``where`` names the text in messages; ``dialect`` None: whichever the text is of.

    Raises:
        UserError: as `stock_net`; or the merged weights are not finite.
    """
    net = stock_net(deploy_text, where, dialect, weights)
    result = Merged(net)
    for layer in list(net.layers):
        if layer.type in ("BatchNorm", "Scale", "Bias"):
            _fold_backward(result, layer, weights)
    for layer in list(net.layers):
        if layer.type in ("Bias", "Power"):
            _fold_forward(result, layer, weights)
    for layer in net.layers:
        if layer.type == "Bias":
            _say_otherwise(result, layer)
    return result


def _fold_backward(result: Merged, layer: StockLayer, weights: Path) -> None:
    """Fold ``layer`` into the convolution or inner product that it alone reads, or say why not."""
    import numpy as np

    layers = result.net.layers
    reason = _why_not(layers, layer)
    if reason:
        if layer.type == "BatchNorm":
            result.left.append(f"{layer.name} (BatchNorm) stays: {reason}")
        return
    producer = layers[_producer(layers, layer)]
    with np.errstate(all="ignore"):
        _scale_outputs(producer, *_gain_and_shift(layer))
    _check_finite(producer, layer, weights)
    producer.message.top[:] = layer.message.top
    layers.remove(layer)
    result.merged.setdefault(producer.name, []).append(layer.name)


def _check_finite(layer: StockLayer, taken: StockLayer, weights: Path) -> None:
    """Raises UserError where the weights of ``layer`` are no numbers, after it took in ``taken``."""
    import numpy as np

    if not all(np.isfinite(blob).all() for blob in layer.blobs):
        raise UserError(
            f"{weights}: {layer.name} with {taken.name} ({taken.type}) has weights that are not finite; the "
            "training went wrong, take an earlier snapshot"
        )


def _why_not(layers: list[StockLayer], layer: StockLayer) -> str | None:
    """Why ``layer`` cannot be folded into the layer before it; None if it can."""
    message = layer.message
    if not _by_channel(layer):
        return "it does not work channel by channel on one input"
    at = _producer(layers, layer)
    if at < 0:
        return "it reads the network's input"
    producer = layers[at]
    if producer.type not in _WEIGHTED:
        return f"it reads {message.bottom[0]}, which {producer.name} ({producer.type}) gives"
    if len(producer.message.bottom) != 1 or not _along_channels(producer):
        return f"{producer.name} ({producer.type}) has no outputs by channel"
    others = [other.name for other in _readers(layers, at) if other is not layer]
    if others:
        return f"{message.bottom[0]} is read by {others[0]}, too"
    return None


def _by_channel(layer: StockLayer) -> bool:
    """Whether ``layer`` has one input and its own numbers for each of its channels."""
    if len(layer.message.bottom) != 1 or not layer.blobs:
        return False
    if layer.type == "BatchNorm":
        return True
    parameters = layer.message.scale_param if layer.type == "Scale" else layer.message.bias_param
    return bool(parameters.axis == 1 and parameters.num_axes == 1)


def _along_channels(layer: StockLayer) -> bool:
    """Whether axis 1 of the output is the layer's own outputs."""
    parameters = (
        layer.message.convolution_param if layer.type == "Convolution" else layer.message.inner_product_param
    )
    return bool(parameters.axis == 1 and layer.blobs)


def _gain_and_shift(layer: StockLayer) -> tuple[Doubles, Doubles]:
    """What ``layer`` multiplies each channel by, and then adds."""
    import numpy as np

    values = [blob.reshape(-1).astype(np.float64) for blob in layer.blobs]
    if layer.type == "BatchNorm":
        gain = 1 / np.sqrt(values[1] + layer.message.batch_norm_param.eps)
        return gain, -values[0] * gain
    if layer.type == "Bias":
        return np.ones_like(values[0]), values[0]
    return values[0], values[1] if len(values) > 1 else np.zeros_like(values[0])


def _scale_outputs(layer: StockLayer, gain: Doubles, shift: Doubles) -> None:
    """Make a convolution's or inner product's outputs ``gain`` times what they were, plus ``shift``."""
    import numpy as np

    weights = layer.blobs[0]
    transposed = layer.type == "InnerProduct" and layer.message.inner_product_param.transpose
    along = (-1,) if transposed else (-1, *[1] * (weights.ndim - 1))
    bias = layer.blobs[1].reshape(-1) if len(layer.blobs) > 1 else 0
    _set_bias(layer, gain * bias + shift)
    layer.blobs[0] = (weights * gain.reshape(along)).astype(np.float32)


def _set_bias(layer: StockLayer, bias: Doubles) -> None:
    import numpy as np

    if layer.type == "Convolution":
        layer.message.convolution_param.bias_term = True
    else:
        layer.message.inner_product_param.bias_term = True
    layer.blobs[1:] = [bias.astype(np.float32)]


def _fold_forward(result: Merged, layer: StockLayer, weights: Path) -> None:
    """Fold what ``layer`` adds to its input into the bias of the one layer that reads it, where exact.

    It is not where the reader pads: the zeros of the padding come after the shift.
    """
    import numpy as np

    layers = result.net.layers
    shift = _shift_of(layer)
    at = layers.index(layer)
    readers = _readers(layers, at)
    if shift is None or len(readers) != 1 or len(layer.message.top) != 1:
        return
    reader = readers[0]
    bottom = layer.message.bottom[0]
    if (
        reader.type not in _WEIGHTED
        or len(reader.message.bottom) != 1
        or not _along_channels(reader)
        or _pads(reader)
        or not _reads_channels(reader, len(shift))
        or _written_by(layers, at, bottom) != _original_writer(layers, layer, layers.index(reader), bottom)
    ):
        return
    with np.errstate(all="ignore"):
        added = _through_weights(reader, shift)
        bias = reader.blobs[1].reshape(-1).astype(np.float64) if len(reader.blobs) > 1 else 0
        _set_bias(reader, bias + added)
    _check_finite(reader, layer, weights)
    reader.message.bottom[:] = [bottom]
    layers.remove(layer)
    result.merged.setdefault(reader.name, []).append(layer.name)


def _shift_of(layer: StockLayer) -> Doubles | None:
    """What ``layer`` adds to each channel (one number: to all); None if it does more than add."""
    import numpy as np

    if layer.type == "Bias":
        return layer.blobs[0].reshape(-1).astype(np.float64) if _by_channel(layer) else None
    parameters = layer.message.power_param
    if parameters.power != 1 or parameters.scale != 1:
        return None
    return np.array([parameters.shift], np.float64)


def _pads(layer: StockLayer) -> bool:
    parameters = layer.message.convolution_param
    return layer.type == "Convolution" and bool(any(parameters.pad) or parameters.pad_h or parameters.pad_w)


def _reads_channels(layer: StockLayer, channels: int) -> bool:
    """Whether the weights of ``layer`` are for an input of so many channels, or for any (1)."""
    weights = layer.blobs[0]
    if layer.type == "Convolution":
        return channels in (1, weights.shape[1] * layer.message.convolution_param.group)
    inputs: int = weights.shape[0 if layer.message.inner_product_param.transpose else 1]
    return channels > 0 and inputs % channels == 0


def _through_weights(layer: StockLayer, shift: Doubles) -> Doubles:
    """What a shift of the input channels comes to in each output: shift times the sum of the weights."""
    import numpy as np

    weights = layer.blobs[0].astype(np.float64)
    if layer.type == "InnerProduct":
        if layer.message.inner_product_param.transpose:
            weights = weights.T
        by_input: Doubles = weights @ np.repeat(shift, weights.shape[1] // len(shift))
        return by_input
    group = layer.message.convolution_param.group
    sums = weights.reshape(group, len(weights) // group, weights.shape[1], -1).sum(axis=3)
    channels = np.broadcast_to(shift, group * weights.shape[1]) if len(shift) == 1 else shift
    by_group: Doubles = np.einsum("goi,gi->go", sums, channels.reshape(group, -1))
    return by_group.reshape(-1)


def _say_otherwise(result: Merged, layer: StockLayer) -> None:
    """A Bias layer that stays, in words that OpenCV knows: Power, or Scale where channels differ."""
    import numpy as np

    message = layer.message
    if not _by_channel(layer):
        result.left.append(
            f"{layer.name} (Bias) stays, which OpenCV does not read: it has two inputs or axes"
        )
        return
    values = layer.blobs[0].reshape(-1)
    message.ClearField("bias_param")
    if np.ptp(values) == 0:
        message.type = "Power"
        message.power_param.shift = float(values[0])
        layer.blobs = []
    else:
        message.type = "Scale"
        message.scale_param.bias_term = True
        layer.blobs = [np.ones_like(values), values]
    result.left.append(f"{layer.name} (Bias) is written as {message.type}: no layer can take it in exactly")


def _written_by(layers: list[StockLayer], before: int, blob: str) -> int:
    """The last layer before ``before`` that writes ``blob``; -1: it is an input of the network."""
    return next((at for at in range(before - 1, -1, -1) if blob in layers[at].message.top), -1)


def _original_writer(layers: list[StockLayer], layer: StockLayer, before: int, blob: str) -> int:
    """As `_written_by`, as if ``layer`` were not there."""
    at = _written_by(layers, before, blob)
    return _written_by(layers, at, blob) if at >= 0 and layers[at] is layer else at


def _producer(layers: list[StockLayer], layer: StockLayer) -> int:
    """The index of the layer that gives what ``layer`` reads; -1: the network's input."""
    at = _written_by(layers, layers.index(layer), layer.message.bottom[0])
    return -1 if at >= 0 and layers[at].type == "Input" else at


def _readers(layers: list[StockLayer], at: int) -> list[StockLayer]:
    """The layers that read what layer ``at`` gives, before another one writes over it."""
    found = []
    for blob in layers[at].message.top:
        for later in layers[at + 1 :]:
            if blob in later.message.bottom:
                found.append(later)
            if blob in later.message.top:
                break
    return found
