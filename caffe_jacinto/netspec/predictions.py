"""What a network predicts: the blobs that its losses compare with labels, and the layers that lead there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from caffe_jacinto.netspec.graph import Node, nodes_of, writer
from caffe_jacinto.netspec.layer_types import role_of
from caffe_jacinto.prototxt.tree import Message

_TWO_INPUTS = ("ContrastiveLoss",)
"""Losses whose first two bottoms are both predictions."""


class Prediction(NamedTuple):
    """A blob that a loss or an accuracy compares with labels."""

    reader: int
    """The layer that reads it, by its index."""

    blob: str


def predictions(layers: Sequence[Message]) -> list[Prediction]:
    """The predictions of a network's layers, of one phase, most important first.

    They are those of the losses, else of the accuracies. Of several losses with the same labels those with
    less than the greatest ``loss_weight`` are auxiliary and left out; of the others, the last comes first.
    """
    losses = [at for at, layer in enumerate(layers) if layer.string("type").endswith("Loss")]
    compared = losses or [at for at, layer in enumerate(layers) if layer.string("type") == "Accuracy"]
    heaviest: dict[str, float] = {}
    for at in compared:
        labels = _labels(layers[at])
        heaviest[labels] = max(heaviest.get(labels, 0.0), _weight(layers[at]))
    found: dict[str, Prediction] = {}
    for at in reversed(compared):
        layer = layers[at]
        if _weight(layer) < heaviest[_labels(layer)]:
            continue
        for blob in layer.strings("bottom")[: 2 if layer.string("type") in _TWO_INPUTS else 1]:
            found.setdefault(blob, Prediction(at, blob))
    return list(found.values())


def leading_to(nodes: Sequence[Node], targets: Sequence[Prediction]) -> set[int]:
    """The layers that the predictions ``targets`` are computed by, by their index."""
    found: set[int] = set()
    waiting = list(targets)
    while waiting:
        before, blob = waiting.pop()
        at = writer(nodes, before, blob)
        if at is None or at in found:
            continue
        found.add(at)
        waiting += [Prediction(at, bottom) for bottom in nodes[at].bottoms]
    return found


def head_of(layers: Sequence[Message], prediction: Prediction) -> Message | None:
    """The last convolution or inner product that leads to a prediction."""
    nodes = nodes_of(layers)
    weighty = ("convolution", "inner product")
    found = [at for at in leading_to(nodes, [prediction]) if role_of(nodes[at].type) in weighty]
    return layers[max(found)] if found else None


def parameters_of(head: Message) -> Message:
    """The message with a convolution's or inner product's ``num_output``."""
    inner = role_of(head.string("type")) == "inner product"
    return head.message("inner_product_param" if inner else "convolution_param")


def _labels(layer: Message) -> str:
    bottoms = layer.strings("bottom")
    return bottoms[1] if len(bottoms) > 1 else ""


def _weight(layer: Message) -> float:
    return layer.number("loss_weight", 1.0)
