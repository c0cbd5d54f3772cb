"""Which layers of a network quantization-aware training rounds: those that lead to its prediction."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.netspec.graph import nodes_of
from caffe_jacinto.netspec.predictions import leading_to, predictions
from caffe_jacinto.prototxt.tree import tree_of


def trained_part(layers: Sequence[Any], where: str) -> list[Any]:
    """The layers that a network's prediction is computed by, its data layers included.

    Args:
        layers: LayerParameter messages of the train phase.
        where: the network's file, for messages.

    Raises:
        UserError: the network has not one prediction, or a layer that is not folded in training.
    """
    trees = [tree_of(layer) for layer in layers]
    found = predictions(trees)
    if len(found) != 1:
        names = ", ".join(prediction.blob for prediction in found) or "none"
        raise UserError(
            f"{where}: quantization-aware training needs one prediction, which a loss or an accuracy reads; "
            f"this network has {len(found)} ({names})"
        )
    part = [layers[at] for at in sorted(leading_to(nodes_of(trees), found))]
    for layer in part:
        if layer.type == "BN":
            raise UserError(
                f"{where}: layer {layer.name} (BN): quantization-aware training folds only BatchNorm and "
                "Scale; write it as these"
            )
    return part


def check_tested(part: Collection[str], there: Collection[str], trained: str, tested: str) -> None:
    """Refuse a test network that lacks layers of the part that is rounded in training.

    Args:
        part: the names of these layers.
        there: the names of the test network's layers.
        trained: the file of the network in training, for messages.
        tested: that of the test network.

    Raises:
        UserError: it does.
    """
    lost = sorted(set(part) - set(there))
    if lost:
        raise UserError(
            f"{tested}: lacks layer {lost[0]} of {trained}, which is quantized there; both need the same "
            "layers up to the prediction"
        )
