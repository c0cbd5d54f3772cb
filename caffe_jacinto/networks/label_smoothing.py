"""Label smoothing in layers that stock Caffe has.

With a share e the target of an image of K classes is 1 - e for its label, and e / K more for every class
(Szegedy et al. 2016, arXiv:1512.00567, section 7). The cross-entropy with it is the sum of

    (1 - e) SoftmaxWithLoss    and    e InfogainLoss with a matrix of which every number is 1 / K,

so that the log shows the usual loss by itself. The matrix is a constant that a DummyData layer gives. Stock
Caffe's InfogainLoss reads scores; that of caffe-jacinto (NVCaffe, infogain_loss_layer.cpp) reads
probabilities, so that a Softmax comes before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from caffe_jacinto.networks.layers import Layer, Other, Softmax, SoftmaxWithLoss
from caffe_jacinto.prototxt.dialects import Dialect

MATRIX = "label_smoothing"
"""The layer and blob of the matrix."""


def smoothed(
    layers: tuple[Layer, ...], share: float, num_classes: int, dialect: Dialect
) -> tuple[Layer, ...]:
    """``layers`` with ``share`` of the weight of each softmax loss on all classes alike."""
    return tuple(_smoothed(layers, share, num_classes, dialect)) if share else layers


def _smoothed(layers: tuple[Layer, ...], share: float, num_classes: int, dialect: Dialect) -> Iterator[Layer]:
    sides = {"num": 1, "channels": 1, "height": num_classes, "width": num_classes}
    filler = {"type": "constant", "value": 1 / num_classes}
    yield Other(MATRIX, (), MATRIX, "DummyData", {"dummy_data_param": {**sides, "data_filler": filler}})
    for layer in layers:
        if not isinstance(layer, SoftmaxWithLoss):
            yield layer
            continue
        yield replace(layer, loss_weight=layer.loss_weight * (1 - share))
        name = f"{layer.name}/smoothing"
        weight = {"loss_weight": layer.loss_weight * share}
        scores, *labels = layer.bottoms
        if dialect is Dialect.CAFFE_JACINTO:
            probabilities = f"{layer.name}/probabilities"
            yield Softmax(probabilities, (scores,), probabilities)
            scores = probabilities
        yield Other(name, (scores, *labels, MATRIX), name, "InfogainLoss", weight)
