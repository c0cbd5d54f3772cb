"""What importers take of a quantized network: its prototxt with ranges, and weights with rounded numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, log2
from typing import Any

from caffe_jacinto.caffemodel.net_file import NewLayer, net_parts
from caffe_jacinto.caffemodel.wire import Part
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.export.stock_net import StockLayer, StockNet
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages, translated
from caffe_jacinto.quantization.grids import Grid
from caffe_jacinto.quantization.network import rounded_blobs
from caffe_jacinto.quantization.results import Result, reach
from caffe_jacinto.quantization.units import Unit

STOCK_DEPLOY = "deploy_stock.prototxt"
"""The name of the network for stock Caffe."""


@dataclass(frozen=True)
class QuantizedFiles:
    """A quantized network for Caffe's importers."""

    stock_text: str
    """The network for stock Caffe and OpenCV."""

    fork_text: str | None
    """The same in caffe-jacinto's dialect, with a ``quantization_param`` in each layer; or None."""

    fork_lacks: str
    """Why caffe-jacinto has no form for it; else empty."""

    net: StockNet
    """With the values of the grids for weights."""

    def weights(self) -> Iterator[Part]:
        """The bytes of the weight file, which both read."""
        bare = type(self.net.layers[0].message)
        layers = [NewLayer(bare(name=item.name, type=item.type), item.blobs) for item in self.net.layers]
        return net_parts(self.net.message.name, layers, Dialect.BVLC)


def quantized_files(net: StockNet, result: Result, last: Any | None, where: str) -> QuantizedFiles:
    """The files of ``net`` as ``result`` quantizes it.

    Args:
        last: a layer that the original network ends with and that is not quantized (its softmax).
        where: the original network, for messages.
    """
    found = result.quantization
    rounded = [
        StockLayer(
            layer.message,
            rounded_blobs(result.network, found, layer.name) if layer.name in found.weights else layer.blobs,
        )
        for layer in net.layers
    ]
    if last is not None:
        rounded.append(StockLayer(translated(last, Dialect.BVLC)[0], []))
    written = StockNet(net.message, rounded)
    try:
        fork_text, lacks = _fork_text(written, result, where), ""
    except UserError as error:
        fork_text, lacks = None, str(error)
    return QuantizedFiles(written.text(), fork_text, lacks, written)


def _fork_text(net: StockNet, result: Result, where: str) -> str:
    from google.protobuf import text_format

    written = messages(Dialect.CAFFE_JACINTO).NetParameter(name=net.message.name)
    written.input.extend(net.message.input)
    for shape in net.message.input_shape:
        written.input_shape.add(dim=shape.dim)
    written.input_dim.extend(net.message.input_dim)
    units = {name: unit for unit in result.network.units for name in (*unit.layers, unit.name)}
    inputs = {top: units[top] for layer in net.layers if layer.type == "Input" for top in layer.message.top}
    for layer in net.layers:
        message, unknown = translated(layer.message, Dialect.CAFFE_JACINTO)
        if unknown:
            raise UserError(
                f"{where}: layer {layer.name} ({layer.type}): caffe-jacinto has no field {unknown[0]}"
            )
        unit = inputs.get(layer.message.top[0]) if layer.type == "Input" else units.get(layer.name)
        if unit is not None:
            _describe(message, layer, unit, result)
        written.layer.append(message)
    return str(text_format.MessageToString(written))


def _describe(message: Any, layer: StockLayer, unit: Unit, result: Result) -> None:
    """Fill a layer's ``quantization_param``: its weights, and the output where its unit ends."""
    found, bits = result.quantization, result.network.bits_of(unit)
    parameters = message.quantization_param
    scheme = result.network.scheme
    if layer.name in found.weights:
        weights, *bias = layer.blobs
        _fill(
            parameters.qparam_w.add(), found.weights[layer.name], bits.weights, weights.min(), weights.max()
        )
        if bias and layer.name in found.biases:
            values = bias[0]
            _fill(parameters.qparam_w.add(), found.biases[layer.name], bits.bias, values.min(), values.max())
        if layer.name in found.inputs:
            given = found.inputs[layer.name]
            # Its bits are those of the layer that wrote it.
            _fill(parameters.qparam_in.add(), given, given.bits, *reach(given))
    ends_unit = layer.type == "Input" or layer.name == unit.layers[-1]
    if ends_unit and unit.name in found.outputs:
        grid = found.outputs[unit.name]
        _fill(parameters.qparam_out.add(), grid, bits.activations, *reach(grid))
    if parameters.ListFields():
        parameters.power2_scale_weights = parameters.power2_scale_activations = scheme.power_of_two
    else:
        message.ClearField("quantization_param")


def _fill(parameters: Any, grid: Grid, bits: int, low: float, high: float) -> None:
    """One QParams message; with a scale for each channel it gives the range alone."""
    parameters.quantize = True
    parameters.bitwidth = bits
    parameters.min, parameters.max = float(low), float(high)
    parameters.unsigned_data = bool(low >= 0)
    parameters.unsigned_quant = bool(isfinite(grid.low) and grid.low >= 0)
    parameters.offset = grid.offset
    if grid.steps.size > 1:
        return
    # The fork's scale is the number of steps in 1.
    parameters.scale_target = parameters.scale_applied = 1 / grid.step
    power = log2(1 / grid.step)
    if power == int(power):
        parameters.fracbits = int(power)
