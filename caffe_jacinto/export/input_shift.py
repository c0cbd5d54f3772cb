"""What a network adds to its images (JacintoNet11: -128), in the form that an importer reads.

It goes into the bias of the layer that reads it where that is exact: where nothing pads. With padding, the
zeros at the border come after the shift; then it stays as a layer, or the border goes into the images.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.export.channelwise import (
    WEIGHTED,
    along_channels,
    bias_of,
    by_channel,
    check_finite,
    graph,
    set_bias,
)
from caffe_jacinto.netspec.graph import Node, readers, writer
from caffe_jacinto.netspec.layer_types.geometry import geometry
from caffe_jacinto.netspec.shapes import layer_shapes
from caffe_jacinto.prototxt.tree import tree_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from caffe_jacinto.export.stock_net import StockLayer, StockNet

    Doubles = NDArray[np.float64]

InputShift = Literal["power", "bias", "scale", "conv"]
"""power: Power, or Scale where channels differ, which stock Caffe and OpenCV read. bias, scale: that layer,
which TI's importer lists. conv: into the first convolution, whose padding goes into the images."""

INPUT_SHIFTS: tuple[InputShift, ...] = get_args(InputShift)

_LISTED_BY_TI = frozenset(
    {
        *("ArgMax", "BatchNorm", "Bias", "Concat", "Convolution", "Crop", "Deconvolution", "Dropout"),
        *("Eltwise", "Flatten", "InnerProduct", "Input", "PReLU", "Pooling", "ReLU", "Scale", "Sigmoid"),
        *("Slice", "Softmax", "Split"),
    }
)
"""Types of stock Caffe's layers in TI's Deep Learning Product User Guide, "TIDL-RT Supported layers" (TIDL
08.02), and those that the importer leaves out."""


def fold_forward(net: StockNet, layer: StockLayer, weights: Path) -> StockLayer | None:
    """Fold what ``layer`` adds to its input into the bias of its only reader, where that is exact.

    It is not exact if the reader pads: padding zeros are added after the shift.

    Returns: the reader; None where ``layer`` stays.
    """
    shift, reader = _shift_of(layer), _only_reader(net, layer)
    if shift is None or reader is None or any(_pads(reader)) or not _reads_channels(reader, len(shift)):
        return None
    _take_shift(net, layer, shift, reader, weights)
    return reader


def fold_with_border(net: StockNet, layer: StockLayer, weights: Path) -> tuple[StockLayer, str]:
    """Fold ``layer``, a Bias that reads the network's input, into a convolution that pads.

    The convolution gets no padding; the input grows by it, and the images need a border with the values that
    the shift makes zero.

    Returns: the convolution, and a line about the border.
    Raises:
        UserError: it cannot be folded.
    """
    source = layer.message.bottom[0]
    given, reader, shift = _input_layer(net, source), _only_reader(net, layer), _shift_of(layer)
    why = None
    if given is None or shift is None or len(given.message.top) != 1:
        why = "the shape of its input is not given by an Input layer of its own"
    elif reader is None or reader.type != "Convolution" or not _reads_channels(reader, len(shift)):
        why = "not one convolution alone reads its output"
    elif len(given.message.input_param.shape[0].dim) != 4:
        why = f"{source} does not have four axes"
    elif sum(source in item.message.bottom for item in net.layers) > 1:
        why = f"another layer reads {source}, too"
    if why or given is None or reader is None or shift is None:
        raise UserError(
            f"layer {layer.name} ({layer.type}) cannot go into a convolution: {why}; write it as a layer: "
            "--input-shift bias or scale"
        )
    pads = _pads(reader)
    _take_shift(net, layer, shift, reader, weights)
    parameters = reader.message.convolution_param
    for field in ("pad", "pad_h", "pad_w"):
        parameters.ClearField(field)
    parameters.pad.append(0)
    dims = given.message.input_param.shape[0].dim
    dims[2], dims[3] = dims[2] + 2 * pads[0], dims[3] + 2 * pads[1]
    values = [f"{0 - value:g}" for value in shift]
    filled = values[0] if len(set(values)) == 1 else f"{', '.join(values)} (by channel)"
    rows, columns = f"{pads[0]} rows above and below", f"{pads[1]} columns left and right"
    return reader, (
        f"{reader.name} pads no more: {source} is {dims[2]}x{dims[3]} (height x width) now; surround the "
        f"images with {rows} and {columns} of {filled}"
    )


def reads_input(net: StockNet, layer: StockLayer) -> bool:
    """Whether ``layer`` reads an input of the network."""
    nodes, at = graph(net.layers), net.layers.index(layer)
    found = writer(nodes, at, layer.message.bottom[0])
    return found is None or nodes[found].type == "Input"


def without_power(net: StockNet) -> None:
    """Write each Power layer that multiplies and adds as Scale, or as Bias where it only adds.

    One of an unknown number of channels stays.
    """
    import numpy as np

    whole = type(net.message)()
    whole.CopyFrom(net.message)
    whole.layer.extend(layer.message for layer in net.layers)
    shapes = [shaped.bottoms for shaped in layer_shapes(tree_of(whole))]
    for layer, bottoms in zip(net.layers, shapes, strict=True):
        if layer.type != "Power" or layer.message.power_param.power != 1:
            continue
        shape = bottoms[0]
        if shape is None or len(shape) < 2:
            continue
        scale, shift = (
            np.full(shape[1], value, np.float32)
            for value in (layer.message.power_param.scale, layer.message.power_param.shift)
        )
        layer.message.ClearField("power_param")
        if (scale == 1).all():
            layer.message.type, layer.blobs = "Bias", [shift]
        else:
            layer.message.type, layer.blobs = "Scale", [scale, shift]
            layer.message.scale_param.bias_term = True


def write_shift(layer: StockLayer, form: InputShift) -> str:
    """Write ``layer``, a Bias that stays, in another form.

    Returns: a line about it.
    """
    import numpy as np

    message = layer.message
    if not by_channel(layer):
        return f"{layer.name} (Bias) stays, since it has two inputs or axes; OpenCV does not read it"
    values = layer.blobs[0].reshape(-1)
    if form == "scale" or (form == "power" and np.ptp(values)):
        message.ClearField("bias_param")
        message.type = "Scale"
        message.scale_param.bias_term = True
        layer.blobs = [np.ones_like(values), values]
    elif form == "power":
        message.ClearField("bias_param")
        message.type = "Power"
        message.power_param.shift = float(values[0])
        layer.blobs = []
    else:
        return f"{layer.name} (Bias) stays: it cannot be merged exactly"
    return f"{layer.name} (Bias) is written as {message.type}: it cannot be merged exactly"


def not_listed_by_ti(net: StockNet) -> list[str]:
    """A line for each layer of a type that TI's guide to its importer does not list."""
    return [
        f"{layer.name} ({layer.type}): TI's importer does not list this type of layer"
        for layer in net.layers
        if layer.type not in _LISTED_BY_TI
    ]


def _only_reader(net: StockNet, layer: StockLayer) -> StockLayer | None:
    """The convolution or inner product that alone reads the output of ``layer``, and could read its input."""
    layers = net.layers
    nodes, at = graph(layers), layers.index(layer)
    found = readers(nodes, at)
    if len(found) != 1 or len(layer.message.top) != 1:
        return None
    reader, bottom = layers[found[0]], layer.message.bottom[0]
    fits = reader.type in WEIGHTED and len(reader.message.bottom) == 1 and along_channels(reader)
    if not fits or writer(nodes, at, bottom) != _writer_without(nodes, at, found[0], bottom):
        return None
    return reader


def _writer_without(nodes: list[Node], removed: int, before: int, blob: str) -> int | None:
    """As `writer`, as if layer ``removed`` were not there."""
    at = writer(nodes, before, blob)
    return writer(nodes, removed, blob) if at == removed else at


def _take_shift(net: StockNet, layer: StockLayer, shift: Doubles, reader: StockLayer, weights: Path) -> None:
    """Remove ``layer`` and add what it adds to the bias of ``reader``."""
    import numpy as np

    with np.errstate(all="ignore"):
        set_bias(reader, bias_of(reader) + _through_weights(reader, shift))
    check_finite(reader, layer, weights)
    reader.message.bottom[:] = layer.message.bottom
    net.layers.remove(layer)


def _shift_of(layer: StockLayer) -> Doubles | None:
    """What ``layer`` adds to each channel (one number: to all); None if it does anything else."""
    import numpy as np

    if layer.type == "Bias":
        return layer.blobs[0].reshape(-1).astype(np.float64) if by_channel(layer) else None
    parameters = layer.message.power_param
    if parameters.power != 1 or parameters.scale != 1:
        return None
    return np.array([parameters.shift], np.float64)


def _pads(layer: StockLayer) -> tuple[int, ...]:
    """The padding of a convolution along each axis; of an inner product, none."""
    if layer.type != "Convolution":
        return ()
    return geometry(tree_of(layer.message), layer.blobs[0].ndim - 2).pad


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


def _input_layer(net: StockNet, blob: str) -> StockLayer | None:
    """The Input layer that gives ``blob`` and its shape."""
    for layer in net.layers:
        if layer.type == "Input" and blob in layer.message.top and layer.message.input_param.shape:
            return layer
    return None
