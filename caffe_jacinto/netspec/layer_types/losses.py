"""Losses, and the accuracy."""

from __future__ import annotations

from caffe_jacinto.netspec.layer_types.base import LayerType, Shapes, axis_of, first_of, required
from caffe_jacinto.prototxt.tree import Message


def _scalar(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """A loss; a second top of SoftmaxWithLoss or InfogainLoss holds the probabilities."""
    return [(), first_of(bottoms)]


def _accuracy(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """Of all, and in a second top of each class."""
    if tops < 2:
        return [()]
    scores = required(bottoms)
    return [(), (scores[axis_of(layer.message("accuracy_param"), 1, scores)],)]


TYPES: dict[str, LayerType] = {
    "Accuracy": LayerType(_accuracy),
    **{
        kind: LayerType(_scalar)
        for kind in (
            *("ContrastiveLoss", "DistillationLoss", "EuclideanLoss", "HingeLoss", "InfogainLoss"),
            *("MultinomialLogisticLoss", "SigmoidCrossEntropyLoss", "SoftmaxWithLoss"),
        )
    },
}
