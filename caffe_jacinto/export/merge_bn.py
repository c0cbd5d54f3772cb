"""Batch norms, scales and input biases folded into the neighbouring convolutions and inner products.

The result is for stock Caffe and for OpenCV 4's reader of Caffe files, which does not support Bias layers. A
folded layer computes ``gain * (w x + b) + shift``: its weights become ``gain * w`` and its bias
``gain * b + shift``, so zero weights stay zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.caffemodel.net_file import NewLayer, net_parts
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.export.stock_net import StockLayer, StockNet, stock_net
from caffe_jacinto.netspec.graph import Node, nodes_of, readers, writer
from caffe_jacinto.prototxt import tree
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.loadable import not_loadable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]

_WEIGHTED = ("Convolution", "InnerProduct")


@dataclass
class Merged:
    """The network after merging, and what was merged."""

    net: StockNet
    merged: dict[str, list[str]] = field(default_factory=dict)
    """The layers merged into each convolution or inner product, by its name."""

    remarks: list[str] = field(default_factory=list)
    """A line for each batch norm that stays, for each bias that is written as another layer, and why; and for
    what stock Caffe cannot load."""

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
    """The deploy network ``deploy_text`` with every layer folded into its convolutions where that is exact.

    ``where`` names the text in messages. Where ``dialect`` is None, the text may be in either.

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
            _write_as_another(result, layer)
    result.remarks += not_loadable(tree.parse(net.text(), where), Dialect.BVLC)
    return result


def _fold_backward(result: Merged, layer: StockLayer, weights: Path) -> None:
    """Fold ``layer`` into the convolution or inner product whose output only it reads, or note why not."""
    import numpy as np

    layers = result.net.layers
    reason = _why_not(layers, layer)
    if reason:
        if layer.type == "BatchNorm":
            result.remarks.append(f"{layer.name} (BatchNorm) stays: {reason}")
        return
    producer = layers[_producer(_nodes(layers), layers.index(layer))]
    with np.errstate(all="ignore"):
        _scale_outputs(producer, *_gain_and_shift(layer))
    _check_finite(producer, layer, weights)
    producer.message.top[:] = layer.message.top
    layers.remove(layer)
    result.merged.setdefault(producer.name, []).append(layer.name)


def _check_finite(layer: StockLayer, taken: StockLayer, weights: Path) -> None:
    """Raise UserError where weights of ``layer`` are not finite, after ``taken`` was merged into it."""
    import numpy as np

    if not all(np.isfinite(blob).all() for blob in layer.blobs):
        raise UserError(
            f"{weights}: {layer.name} with {taken.name} ({taken.type}) has weights that are not finite; the "
            "training went wrong, use an earlier snapshot"
        )


def _why_not(layers: list[StockLayer], layer: StockLayer) -> str | None:
    """Why ``layer`` cannot be folded into the layer before it; None if it can."""
    message, nodes = layer.message, _nodes(layers)
    if not _by_channel(layer):
        return "it does not work channel by channel on one input"
    at = _producer(nodes, layers.index(layer))
    if at < 0:
        return "it reads the network's input"
    producer = layers[at]
    if producer.type not in _WEIGHTED:
        return f"it reads {message.bottom[0]}, the output of {producer.name} ({producer.type})"
    if len(producer.message.bottom) != 1 or not _along_channels(producer):
        return f"the outputs of {producer.name} ({producer.type}) are not its channels"
    others = [nodes[other].name for other in readers(nodes, at) if layers[other] is not layer]
    if others:
        return f"{others[0]} also reads {message.bottom[0]}"
    return None


def _by_channel(layer: StockLayer) -> bool:
    """Whether ``layer`` has one input, and one number of its own per channel."""
    if len(layer.message.bottom) != 1 or not layer.blobs:
        return False
    if layer.type == "BatchNorm":
        return True
    parameters = layer.message.scale_param if layer.type == "Scale" else layer.message.bias_param
    return bool(parameters.axis == 1 and parameters.num_axes == 1)


def _along_channels(layer: StockLayer) -> bool:
    """Whether axis 1 of the output has one place for each of the layer's outputs."""
    parameters = (
        layer.message.convolution_param if layer.type == "Convolution" else layer.message.inner_product_param
    )
    return bool(parameters.axis == 1 and layer.blobs)


def _gain_and_shift(layer: StockLayer) -> tuple[Doubles, Doubles]:
    """The factor by which ``layer`` multiplies each channel, and what it then adds."""
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
    """Fold what ``layer`` adds to its input into the bias of its only reader, where that is exact.

    It is not exact if the reader pads: padding zeros are added after the shift.
    """
    import numpy as np

    layers = result.net.layers
    shift = _shift_of(layer)
    at = layers.index(layer)
    nodes = _nodes(layers)
    found = readers(nodes, at)
    if shift is None or len(found) != 1 or len(layer.message.top) != 1:
        return
    reader = layers[found[0]]
    bottom = layer.message.bottom[0]
    if (
        reader.type not in _WEIGHTED
        or len(reader.message.bottom) != 1
        or not _along_channels(reader)
        or _pads(reader)
        or not _reads_channels(reader, len(shift))
        or writer(nodes, at, bottom) != _writer_without(nodes, at, found[0], bottom)
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
    """What ``layer`` adds to each channel (one number: to all); None if it does anything else."""
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
    """Whether the weights of ``layer`` take an input of ``channels`` channels (1: of any number)."""
    weights = layer.blobs[0]
    if layer.type == "Convolution":
        return channels in (1, weights.shape[1] * layer.message.convolution_param.group)
    inputs: int = weights.shape[0 if layer.message.inner_product_param.transpose else 1]
    return channels > 0 and inputs % channels == 0


def _through_weights(layer: StockLayer, shift: Doubles) -> Doubles:
    """What a shift of the input channels adds to each output: the shift times the sum of the weights."""
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


def _write_as_another(result: Merged, layer: StockLayer) -> None:
    """Write a Bias layer that stays as one that OpenCV reads: Power, or Scale where channels differ."""
    import numpy as np

    message = layer.message
    if not _by_channel(layer):
        result.remarks.append(
            f"{layer.name} (Bias) stays, since it has two inputs or axes; OpenCV does not read it"
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
    result.remarks.append(f"{layer.name} (Bias) is written as {message.type}: it cannot be merged exactly")


def _nodes(layers: list[StockLayer]) -> list[Node]:
    return nodes_of(layer.message for layer in layers)


def _writer_without(nodes: list[Node], removed: int, before: int, blob: str) -> int | None:
    """As `writer`, as if layer ``removed`` were not there."""
    at = writer(nodes, before, blob)
    return writer(nodes, removed, blob) if at == removed else at


def _producer(nodes: list[Node], at: int) -> int:
    """The layer whose output layer ``at`` reads; -1 for the network's input."""
    producer = writer(nodes, at, nodes[at].bottoms[0])
    return -1 if producer is None or nodes[producer].type == "Input" else producer
