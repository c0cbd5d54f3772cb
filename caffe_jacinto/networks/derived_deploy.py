"""The deploy network of a user's network: declared inputs for its data layers, predictions for its losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.netspec.data_fit import DataSize, given_shape, source_of
from caffe_jacinto.netspec.graph import Node, nodes_of
from caffe_jacinto.netspec.predictions import leading_to, predictions
from caffe_jacinto.networks.prototxt_file import NetFile
from caffe_jacinto.prototxt import tree
from caffe_jacinto.prototxt.edit import Edits
from caffe_jacinto.prototxt.render import quote
from caffe_jacinto.prototxt.tree import Message

_ACTIVATIONS = {
    "SoftmaxWithLoss": "Softmax",
    "Accuracy": "Softmax",
    "SigmoidCrossEntropyLoss": "Sigmoid",
}
"""What a loss applies to the scores itself, and the deploy network needs a layer for."""

_HEADER = ("name", "input", "input_shape", "input_dim")


def deploy_text(net: NetFile, data: Mapping[str, DataSize]) -> str:
    """The deploy network of the test network ``net``, for a batch of one image.

    The layers that lead to a prediction stay as they are written, but for their `include` and `exclude`.

    Raises:
        UserError: there is no loss or accuracy, or the size of the images is not known.
    """
    layers, nodes = net.layers, nodes_of(net.layers)
    found = predictions(layers)
    if not found:
        raise UserError(
            f"{net.path}: the network has no loss and no accuracy in the phase {net.state.phase}, so that "
            "its output is not known; add one"
        )
    needed = leading_to(nodes, found)
    parts = [_slice(net, place.start, place.end) for name in _HEADER for place in net.tree.places_of(name)]
    outputs = []
    for prediction in reversed(found):
        softmax = next(
            (
                at
                for at, node in enumerate(nodes)
                if node.type in ("Softmax", "Sigmoid") and node.bottoms[:1] == (prediction.blob,)
            ),
            None,
        )
        loss = layers[prediction.reader]
        if softmax is not None:
            needed.add(softmax)
        elif loss.string("type") in _ACTIVATIONS and not _is_activated(nodes, needed, prediction.blob):
            name = "prob" if not any("prob" in (node.name, *node.tops) for node in nodes) else "prediction"
            outputs.append((loss, prediction.blob, name if len(found) == 1 else f"{prediction.blob}/{name}"))
    for at in sorted(needed):
        layer = layers[at]
        if layer in net.sources:
            read = {blob for other in needed for blob in nodes[other].bottoms}
            parts += [
                _input(net, layer, top, index, data)
                for index, top in enumerate(nodes[at].tops)
                if top in read
            ]
        else:
            parts.append(_without_rules(net, layer))
    parts += [_activation(*output) for output in outputs]
    return "\n".join(parts) + "\n"


def _is_activated(nodes: Sequence[Node], needed: set[int], blob: str) -> bool:
    return any(nodes[at].type in ("Softmax", "Sigmoid") and blob in nodes[at].tops for at in needed)


def _slice(net: NetFile, start: int, end: int) -> str:
    """A part of the text with the indentation of its first line removed from all of its lines."""
    line = net.text.rfind("\n", 0, start) + 1
    margin = net.text[line:start]
    text = net.text[start:end]
    return text.replace("\n" + margin, "\n") if margin and not margin.strip() else text


def _without_rules(net: NetFile, layer: Message) -> str:
    assert layer.place is not None
    rules = [place for name in ("include", "exclude") for place in layer.places_of(name)]
    if not rules:
        return _slice(net, layer.place.start, layer.place.end)
    text = _slice(net, layer.place.start, layer.place.end)
    alone = tree.parse(text, net.path).messages("layer")[0]
    edits = Edits(text)
    for name in ("include", "exclude"):
        for place in alone.places_of(name):
            edits.remove(place)
    return edits.text()


def _input(net: NetFile, layer: Message, top: str, index: int, data: Mapping[str, DataSize]) -> str:
    if index:
        raise UserError(
            f"{net.where(layer)}: top {top}: the network computes its prediction from the labels, which a "
            "deploy network does not have"
        )
    shape = given_shape(layer, data.get(source_of(layer)))
    if shape is None:
        raise UserError(f"{net.where(layer)}: the size of the images in {source_of(layer)} is not known")
    dims = " ".join(f"dim: {dim}" for dim in (1, *shape))
    return (
        f'layer {{\n  name: {quote(top)}\n  type: "Input"\n  top: {quote(top)}\n'
        f"  input_param {{ shape {{ {dims} }} }}\n}}"
    )


def _activation(loss: Message, blob: str, name: str) -> str:
    kind = _ACTIVATIONS[loss.string("type")]
    axis = loss.message("softmax_param").optional_integer("axis")
    extra = f"  softmax_param {{ axis: {axis} }}\n" if axis is not None and kind == "Softmax" else ""
    return (
        f"layer {{\n  name: {quote(name)}\n  type: {quote(kind)}\n  bottom: {quote(blob)}\n"
        f"  top: {quote(name)}\n{extra}}}"
    )
