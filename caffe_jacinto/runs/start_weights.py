"""The weights that a stage starts from: whether they fit, and a file without what is left out of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.networks.registry import layers_to_name, stored_names, with_batch_norms
from caffe_jacinto.networks.stage_files import network_of
from caffe_jacinto.runs.plan import RunPlan, StagePlan

if TYPE_CHECKING:
    from caffe_jacinto.caffemodel.fit import Mismatch

SHOWN = 3
"""Layers that one message names."""


def check_start_weights(run: RunPlan, plan: StagePlan, train: str) -> list[str]:
    """What the user should know of the stage's start weights: a line for each layer that does not take them.

    ``train`` is the text of the stage's train.prototxt.

    Raises:
        UserError: the file is missing or broken, a layer has another shape there and is not in the stage's
            `reinit`, a frozen layer is not there, or the file has nothing for the network.
    """
    from caffe_jacinto.caffemodel.fit import check_fit, unused_layers
    from caffe_jacinto.prototxt.schema import parse_net

    assert plan.start_weights is not None
    if not plan.start_weights.is_file():
        raise UserError(
            f"stage {plan.name}: no start weights at {plan.start_weights}; train or name them first"
        )
    net = parse_net(train, run.engine.info.dialect, "train.prototxt")
    mismatches = {mismatch.layer: mismatch for mismatch in check_fit(plan.start_weights, net)}
    left_out = _left_out(run, plan)
    wrong = [found for found in mismatches.values() if found.fatal and found.layer not in left_out]
    if wrong:
        raise UserError(
            f"stage {plan.name}: the start weights {plan.start_weights} do not fit the network: "
            f"{_what_differs(run, plan, wrong)}"
        )
    network = network_of(run.recipe)
    frozen = with_batch_norms(network, run.recipe.network.frozen, "network.frozen")
    lost = [name for name in mismatches if name in stored_names(network, frozen)]
    if lost:
        raise UserError(
            f"stage {plan.name}: network.frozen keeps layers as they are in {plan.start_weights}, which "
            f"lacks {_listed(lost)}; take them out of network.frozen, or name other weights"
        )
    notes = [
        f"{layer.name}: starts at random values: {_why(layer.name, mismatches, left_out)}"
        for layer in net.layer
        if layer.name in mismatches or layer.name in left_out
    ]
    notes += [
        f"{name}: in the start weights, but not in the network; not used"
        for name in unused_layers(plan.start_weights, net)
    ]
    return [f"stage {plan.name}: layer {note}" for note in notes]


def write_start_weights(run: RunPlan, plan: StagePlan) -> None:
    """Write what Caffe is given of the start weights, where that is not all of them.

    Raises:
        UserError: the start weights are missing or broken, or the file cannot be written.
    """
    if not plan.stage.reinit:
        return
    from caffe_jacinto.caffemodel.net_file import without_layers

    assert plan.start_weights is not None
    assert plan.loaded_weights is not None
    content = without_layers(plan.start_weights, _left_out(run, plan))
    try:
        write_whole(plan.loaded_weights, content)
    except OSError as error:
        raise UserError(f"{plan.loaded_weights}: cannot be written: {error.strerror}") from None


def _left_out(run: RunPlan, plan: StagePlan) -> frozenset[str]:
    """The layers of the weight file that the stage's `reinit` leaves out."""
    network = network_of(run.recipe)
    key = f"stages.{plan.name}.reinit"
    return stored_names(network, with_batch_norms(network, plan.stage.reinit, key))


def _why(layer: str, mismatches: dict[str, Mismatch], left_out: Collection[str]) -> str:
    if layer not in mismatches:
        return "reinit names it"
    return mismatches[layer].reason + (" (reinit)" if layer in left_out else "")


def _what_differs(run: RunPlan, plan: StagePlan, wrong: Sequence[Mismatch]) -> str:
    """The layers that do not fit, and what to do about it."""
    converted = next((found for found in wrong if found.cause == "other Caffe"), None)
    if converted is not None:
        return str(converted)  # true of every layer with batch norm; no layer is to be left out for it
    names = layers_to_name(network_of(run.recipe), [found.layer for found in wrong if found.cause == "shape"])
    if not names:
        return _listed(wrong)
    shown = ", ".join(f'"{name}"' for name in (*plan.stage.reinit, *names))
    return (
        f"{_listed(wrong)}; if num_classes, crop_size and strides are as meant, train these layers anew with "
        f"stages.{plan.name}.reinit=[{shown}]"
    )


def _listed(items: Sequence[object]) -> str:
    more = f"; and {len(items) - SHOWN} more" if items[SHOWN:] else ""
    return "; ".join(map(str, items[:SHOWN])) + more
