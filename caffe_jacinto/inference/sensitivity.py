"""How much each layer of a trained network suffers from pruning, and targets by layer that follow from it.

The method is that of Han, Pool, Tran and Dally 2015, "Learning both Weights and Connections for Efficient
Neural Networks" (arXiv:1506.02626, section 4.2): one layer at a time is pruned to several sparsities, without
training, and the network is tested. Here the measure is the loss (cross-entropy) on validation images, which
is finer than the accuracy; and no threshold is chosen by hand: every layer gets the sparsity at which the
loss has risen by the same amount, and that amount is the one by which the whole network gets to its target.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.caffemodel.net_file import open_net
from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import image_progress
from caffe_jacinto.inference.backends import open_backend
from caffe_jacinto.inference.network import Sample, TrainedNetwork
from caffe_jacinto.inference.scores import softmax_loss
from caffe_jacinto.pruning.layers import CountedLayer, find_counted, why_not_pruned
from caffe_jacinto.pruning.rule import most_zeros
from caffe_jacinto.pruning.sparsify import sparsify
from caffe_jacinto.recipes.load import toml_value
from caffe_jacinto.recipes.model import FLOAT32_MAX, SparseSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEVELS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
"""The sparsities that each layer is tested at. No layer gets more than the last one."""

LEAST = 0.01
"""A layer that would get less is left out."""

_BATCH = 50
_HALVINGS = 60


@dataclass(frozen=True)
class Sensitivity:
    """What pruning one layer alone does to the loss."""

    layer: CountedLayer
    rises: tuple[float, ...]
    """By how much the loss is above that of the whole network, at each of `LEVELS`."""

    def sparsity_for(self, rise: float) -> float:
        """The highest sparsity at which the loss has risen by no more, between the levels by a line.

        Where a measured rise is below that of a lower level, the higher of the two counts.
        """
        before, last = 0.0, 0.0
        for level, measured in zip(LEVELS, self.rises, strict=True):
            after = max(measured, last)
            if after > rise:
                return before + (level - before) * (rise - last) / (after - last)
            before, last = level, after
        return before


def measure(
    network: TrainedNetwork, samples: Iterator[Sample], rule: SparseSettings, report: Callable[[str], None]
) -> list[Sensitivity]:
    """The sensitivity of each layer that ``rule`` prunes, on labelled ``samples``.

    A layer's smallest weights are pruned in each output channel, without the caps of training. ``report``
    is given what computes the network.

    Raises:
        UserError: there are no such samples or layers, or no backend can compute the network.
    """
    batches = list(_batches(samples))
    layers = _pruned_layers(network, rule)
    report(open_backend(None, network, None).label)
    whole = _loss(network, batches)
    found = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        image_progress("sensitivity", len(layers) * len(LEVELS), unit="tests") as advance,
    ):
        pruned = Path(scratch) / "pruned.caffemodel"
        for layer in layers:
            rises = []
            for level in LEVELS:
                alone = _alone(rule, layer.name, level)
                sparsify(network.weights, pruned, network.dialect, alone, level)
                rises.append(_loss(replace(network, weights=pruned), batches) - whole)
                advance()
            found.append(Sensitivity(layer, tuple(rises)))
    return found


def check_target(target: float) -> None:
    """Refuse a target above the highest level, which no layer goes beyond.

    Raises:
        UserError: it is.
    """
    if target > LEVELS[-1]:
        raise UserError(f"--target {target:g}: no layer is pruned to more than {LEVELS[-1]:g}; lower it")


def targets_for(found: Sequence[Sensitivity], target: float) -> dict[str, float]:
    """The sparsity of each layer at which the network is pruned to ``target``, in hundredths.

    The layers are those of ``found``; the network's others do not count. The loss has risen by the same
    amount in each, as far as no layer is at the highest level. That is found by bisection. In hundredths they
    reach the target, too, by channel as by layer, where the highest level allows it.

    Raises:
        UserError: as `check_target`.
    """
    check_target(target)
    weights = sum(one.layer.weights for one in found)

    def sparsity(rise: float) -> float:
        return sum(one.sparsity_for(rise) * one.layer.weights for one in found) / weights

    highest = max(rise for one in found for rise in one.rises)
    low, high = 0.0, max(highest, 0.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if sparsity(middle) >= target else (middle, high)
    hundredths = _reaching(found, [100 * one.sparsity_for(high) for one in found], target * weights)
    shares = {one.layer.name: number / 100 for one, number in zip(found, hundredths, strict=True)}
    return {name: share for name, share in shares.items() if share >= LEAST}


def _reaching(found: Sequence[Sensitivity], exact: Sequence[float], zeros: float) -> list[int]:
    """The ``exact`` hundredths of the layers as whole numbers with which so many weights become zero.

    Where rounding them is not enough, those are raised first that are the furthest below what is exact.
    """
    rounded = [round(share) for share in exact]
    most = round(100 * LEVELS[-1])

    def pruned(at: int) -> int:
        outputs = max(found[at].layer.outputs, 1)
        return outputs * most_zeros(found[at].layer.weights // outputs, rounded[at] / 100)

    reached = sum(map(pruned, range(len(found))))
    while reached < zeros - 0.5:
        below = [at for at in range(len(found)) if rounded[at] < most]
        if not below:
            break
        at = max(below, key=lambda one: exact[one] - rounded[one])
        reached -= pruned(at)
        rounded[at] += 1
        reached += pruned(at)
    return rounded


def _batches(samples: Iterator[Sample]) -> Iterator[tuple[NDArray[np.float32], list[int]]]:
    """Images x channels x height x width, and their labels; samples without either are passed over."""
    import numpy as np

    good = (sample for sample in samples if sample.image is not None and sample.label is not None)
    while batch := list(islice(good, _BATCH)):
        images = np.stack([sample.image for sample in batch if sample.image is not None])
        yield images, [sample.label for sample in batch if sample.label is not None]


def _pruned_layers(network: TrainedNetwork, rule: SparseSettings) -> list[CountedLayer]:
    stored = read_weights(network.weights)
    with open_net(network.weights, network.dialect) as (_, layers):
        headers = [layer.header for layer in layers]

    def shape_of(name: str) -> tuple[int, ...] | None:
        return stored[name][0].shape if stored.get(name) else None

    counted = find_counted(headers, shape_of, inner_products=rule.inner_products)
    taken = [layer for layer in counted if why_not_pruned(layer, rule) is None]
    if not taken:
        raise UserError(f"{network.weights}: the pruning rule takes none of its layers; try --min-kernel 1")
    return taken


def _alone(rule: SparseSettings, layer: str, level: float) -> SparseSettings:
    """``rule`` for one layer, pruned to ``level``."""
    changes = {"target": level, "layers": (layer,), "skip": (), "targets": {layer: level}}
    caps = {"threshold_maxratio": 1.0, "threshold_value_max": FLOAT32_MAX}
    return rule.model_copy(update=changes | caps)


def _loss(network: TrainedNetwork, batches: Sequence[tuple[NDArray[np.float32], list[int]]]) -> float:
    """The mean cross-entropy."""
    if not batches:
        raise UserError("no validation image with a label can be read; give another --lmdb")
    backend = open_backend(None, network, None)
    total = sum(softmax_loss(backend.scores(images), labels) for images, labels in batches)
    mean = total / sum(len(labels) for _, labels in batches)
    return mean if math.isfinite(mean) else math.inf


def as_toml(targets: Mapping[str, float]) -> str:
    """The recipe's line: ``targets = { "conv1a" = 0.31, ... }``."""
    return (
        "targets = { "
        + ", ".join(f"{toml_value(name)} = {share:g}" for name, share in targets.items())
        + " }"
    )
