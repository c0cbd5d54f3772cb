"""Layers that read the labels of mixed images: `data/augment.py` has the formula, `loading.py` the labels."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from caffe_jacinto.engines.pytorch.layer_setup import Blobs, Forward, LayerSetup

LOSSES = ("SoftmaxWithLoss", "InfogainLoss")
"""Losses that are linear in the label's weights: that of a mixture is the mixture of those of its parts."""


def of_mixed_labels(layer: LayerSetup, function: Forward, mixed: Collection[str]) -> Forward:
    """``function`` of a layer whose labels are 3 x batch: own labels, those of the others, own shares.

    A loss is that of the own labels times their share, and that of the others times the rest; an accuracy is
    that of the own labels. Other layers are refused, and so are mixed labels that are not the second bottom.
    """
    bottoms, kind = list(layer.message.bottom), layer.message.type
    if kind not in (*LOSSES, "Accuracy") or [at for at, name in enumerate(bottoms) if name in mixed] != [1]:
        layer.refuse(
            "reads the labels of images that are mixed (mixup_alpha), which only "
            f"{', '.join(LOSSES)} and Accuracy can, as their second bottom; remove one of the two"
        )

    def forward(blobs: Blobs, scores: Tensor, labels: Tensor, *rest: Tensor) -> Any:
        own, others, shares = labels.unbind()
        first: Any = function(blobs, scores, own, *rest)
        if kind == "Accuracy":
            return first
        second: Any = function(blobs, scores, others, *rest)
        share = shares[0]  # the same for all images of a batch
        if isinstance(first, tuple):
            return (share * first[0] + (1 - share) * second[0], *first[1:])
        return share * first + (1 - share) * second

    return forward
