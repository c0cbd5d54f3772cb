"""Batch norms, scales and input biases folded into the neighbouring convolutions and inner products.

The result is for stock Caffe and, as `input_shift.py` writes it, for OpenCV 4's reader of Caffe files or for
TI's importer. A folded layer computes ``gain * (w x + b) + shift``: its weights become ``gain * w`` and its
bias ``gain * b + shift``, so zero weights stay zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.caffemodel.net_file import NewLayer, net_parts
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.export.channelwise import (
    SCALED,
    along_channels,
    bias_of,
    by_channel,
    check_finite,
    gain_and_shift,
    graph,
    set_bias,
)
from caffe_jacinto.export.input_shift import (
    InputShift,
    fold_forward,
    fold_with_border,
    not_listed_by_ti,
    reads_input,
    without_power,
    write_shift,
)
from caffe_jacinto.export.stock_net import StockLayer, StockNet, stock_net
from caffe_jacinto.netspec.graph import Node, readers, writer
from caffe_jacinto.prototxt import tree
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.loadable import not_loadable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]


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


def merge_bn(
    deploy_text: str,
    where: str,
    dialect: Dialect | None,
    weights: Path,
    input_shift: InputShift = "power",
) -> Merged:
    """The deploy network ``deploy_text`` with every layer folded into its convolutions where that is exact.

    Args:
        where: names the text in messages.
        dialect: of the text; None: either.
        input_shift: the form of what is added to images and cannot be folded. Any but ``power`` is for
            importers that read no Power layer.

    Raises:
        UserError: as `stock_net`; or the merged weights are not finite; or the shift cannot go into a
            convolution.
    """
    net = stock_net(deploy_text, where, dialect, weights)
    result = Merged(net)
    if input_shift != "power":
        without_power(net)
    for layer in list(net.layers):
        if layer.type in ("BatchNorm", "Scale", "Bias"):
            _fold_backward(result, layer, weights)
    for layer in list(net.layers):
        if layer.type in ("Bias", "Power"):
            reader = fold_forward(net, layer, weights)
            if reader is not None:
                result.merged.setdefault(reader.name, []).append(layer.name)
    for layer in list(net.layers):
        if layer.type == "Bias":
            _write_bias(result, layer, input_shift, where, weights)
    if input_shift != "power":
        result.remarks += not_listed_by_ti(net)
    result.remarks += not_loadable(tree.parse(net.text(), where), Dialect.BVLC)
    return result


def _write_bias(result: Merged, layer: StockLayer, form: InputShift, where: str, weights: Path) -> None:
    """Write a Bias layer that stays in the form that is asked for."""
    if form != "conv" or not by_channel(layer) or not reads_input(result.net, layer):
        result.remarks.append(write_shift(layer, form))
        return
    try:
        reader, remark = fold_with_border(result.net, layer, weights)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    result.merged.setdefault(reader.name, []).append(layer.name)
    result.remarks.append(remark)


def _fold_backward(result: Merged, layer: StockLayer, weights: Path) -> None:
    """Fold ``layer`` into the convolution or inner product whose output only it reads, or note why not."""
    import numpy as np

    layers = result.net.layers
    reason = _why_not(layers, layer)
    if reason:
        if layer.type == "BatchNorm":
            result.remarks.append(f"{layer.name} (BatchNorm) stays: {reason}")
        return
    producer = layers[_producer(graph(layers), layers.index(layer))]
    with np.errstate(all="ignore"):
        _scale_outputs(producer, *gain_and_shift(layer))
    check_finite(producer, layer, weights)
    producer.message.top[:] = layer.message.top
    layers.remove(layer)
    result.merged.setdefault(producer.name, []).append(layer.name)


def _why_not(layers: list[StockLayer], layer: StockLayer) -> str | None:
    """Why ``layer`` cannot be folded into the layer before it; None if it can."""
    message, nodes = layer.message, graph(layers)
    if not by_channel(layer):
        return "it does not work channel by channel on one input"
    at = _producer(nodes, layers.index(layer))
    if at < 0:
        return "it reads the network's input"
    producer = layers[at]
    if producer.type not in SCALED:
        return f"it reads {message.bottom[0]}, the output of {producer.name} ({producer.type})"
    if len(producer.message.bottom) != 1 or not along_channels(producer):
        return f"the outputs of {producer.name} ({producer.type}) are not its channels"
    others = [nodes[other].name for other in readers(nodes, at) if layers[other] is not layer]
    if others:
        return f"{others[0]} also reads {message.bottom[0]}"
    return None


def _scale_outputs(layer: StockLayer, gain: Doubles, shift: Doubles) -> None:
    """Make a layer's outputs ``gain`` times what they were, plus ``shift``."""
    import numpy as np

    weights = layer.blobs[0]
    set_bias(layer, gain * bias_of(layer) + shift)
    if layer.type == "Deconvolution":  # inputs of all groups x outputs of one group x kernel
        groups = layer.message.convolution_param.group
        by_input = gain.reshape(groups, -1).repeat(weights.shape[0] // groups, axis=0)
        gain = by_input.reshape(weights.shape[:2] + (1,) * (weights.ndim - 2))
    elif layer.type == "Convolution" or not layer.message.inner_product_param.transpose:
        gain = gain.reshape(-1, *[1] * (weights.ndim - 1))
    layer.blobs[0] = (weights * gain).astype(np.float32)


def _producer(nodes: list[Node], at: int) -> int:
    """The layer whose output layer ``at`` reads; -1 for the network's input."""
    producer = writer(nodes, at, nodes[at].bottoms[0])
    return -1 if producer is None or nodes[producer].type == "Input" else producer
