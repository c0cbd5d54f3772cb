"""Losses, and the accuracy."""

from __future__ import annotations

from caffe_jacinto.netspec.layer_types.base import LayerType, Shapes, first_of
from caffe_jacinto.prototxt.tree import Message


def _scalar(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """A loss or an accuracy; a second top of SoftmaxWithLoss holds the probabilities."""
    return [(), first_of(bottoms)]


TYPES: dict[str, LayerType] = {
    kind: LayerType(_scalar)
    for kind in (
        *("Accuracy", "ContrastiveLoss", "EuclideanLoss", "HingeLoss", "InfogainLoss"),
        *("MultinomialLogisticLoss", "SigmoidCrossEntropyLoss", "SoftmaxWithLoss"),
    )
}
