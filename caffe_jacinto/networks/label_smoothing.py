"""Label smoothing in layers that stock Caffe has.

With a share e the target of an image of K classes is 1 - e for its label, and e / K more for every class
(Szegedy et al. 2016, arXiv:1512.00567, section 7). The cross-entropy with it is the sum of

    (1 - e) SoftmaxWithLoss    and    e InfogainLoss with a matrix of which every number is 1 / K,

so that the log shows the usual loss by itself. The matrix is a constant that a DummyData layer gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from caffe_jacinto.networks.layers import Layer, Other, SoftmaxWithLoss

MATRIX = "label_smoothing"
"""The layer and blob of the matrix."""


def smoothed(layers: tuple[Layer, ...], share: float, num_classes: int) -> tuple[Layer, ...]:
    """``layers`` with ``share`` of the weight of each softmax loss on all classes alike."""
    return tuple(_smoothed(layers, share, num_classes)) if share else layers


def _smoothed(layers: tuple[Layer, ...], share: float, num_classes: int) -> Iterator[Layer]:
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
        yield Other(name, (*layer.bottoms, MATRIX), name, "InfogainLoss", weight)
