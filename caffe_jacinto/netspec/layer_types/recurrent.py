"""Recurrent layers: their first axis is time, their second the streams."""

from __future__ import annotations

from caffe_jacinto.netspec.layer_types.base import Dim, LayerType, Shape, Shapes, product, required
from caffe_jacinto.prototxt.tree import Message


def _outputs(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """Of all times; then, where it is shown, what is remembered at the end."""
    outputs = layer.message("recurrent_param").integer("num_output")
    time, streams = required(bottoms)[:2]
    return [(time, streams, outputs), *[(1, streams, outputs)] * (tops - 1)]


def _blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    """Of x, of what does not change over time, of what is remembered; an RNN's output has its own, too."""
    parameter = layer.message("recurrent_param")
    outputs, lstm = parameter.integer("num_output"), layer.string("type") == "LSTM"
    rows = 4 * outputs if lstm else outputs
    shown = (2 if lstm else 1) if parameter.flag("expose_hidden") else 0
    constant = len(bottoms) > 2 + shown
    found: list[Shape] = [(rows, _numbers(bottoms[0], 2)), (rows,)]
    if constant:
        found.append((rows, _numbers(bottoms[2], 1)))
    found.append((rows, outputs))
    return found if lstm else [*found, (outputs, outputs), (outputs,)]


def _numbers(shape: Shape | None, axis: int) -> Dim:
    return None if shape is None else product(shape[axis:])


def _unit(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    return [required(bottoms)] * tops


TYPES: dict[str, LayerType] = {
    "LSTM": LayerType(_outputs, _blobs),
    "LSTMUnit": LayerType(_unit),
    "RNN": LayerType(_outputs, _blobs),
}
