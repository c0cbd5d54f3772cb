"""How sparse a schedule of thresholds can make a network before its stage ends, found without training.

A threshold zeroes at most the schedule's factor of the weights that it is for (an output channel's, or a
layer's), and zeros that are there already stay. So what is counted here is the most that there can be; the
caps of the thresholds (`rule.small_weights`) only lower it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.pruning.layers import CountedLayer, layer_fraction, target_of, why_not_pruned
from caffe_jacinto.pruning.rule import most_zeros, zeros_in_common
from caffe_jacinto.pruning.schedule import factors, step_iterations

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from caffe_jacinto.recipes.model import SparseSettings

    Zeros = Mapping[str, NDArray[np.int64]]
    """For each layer that counts, the zeros that each of its output channels has at most."""

MOST_THRESHOLDS = 100_000
"""A schedule in finer steps than this is followed no further."""


@dataclass(frozen=True)
class Reach:
    """What a schedule can do until its stage ends."""

    steps: int
    """Threshold steps before the stage's last iteration."""

    thresholds: int
    """How many of them apply a threshold: the schedule may end before."""

    factor: float
    """The last factor applied; the start factor without a threshold."""

    zeros: Zeros
    """After the stage."""

    sparsity: float
    """Zeros over weights of all layers that count, at most."""


def reach(
    layers: Sequence[CountedLayer], sparse: SparseSettings, max_iter: int | None, start: Zeros
) -> Reach:
    """The most that ``sparse`` can reach in ``max_iter`` iterations (None: as many as it takes).

    ``start`` has the zeros at the start of the stage.
    """
    steps = MOST_THRESHOLDS if max_iter is None else len(step_iterations(sparse, max_iter))
    applied = list(islice(factors(sparse), min(steps, MOST_THRESHOLDS)))
    zeros = most_zeros_at(layers, sparse, applied[-1], start) if applied else dict(start)
    factor = applied[-1] if applied else sparse.start_factor
    return Reach(steps, len(applied), factor, zeros, sparsity_of(layers, zeros))


def thresholds_needed(layers: Sequence[CountedLayer], sparse: SparseSettings, start: Zeros) -> int | None:
    """How many thresholds the target takes at least; None where the schedule ends below it."""
    if sparsity_of(layers, start) >= sparse.target:
        return 0
    applied = list(islice(factors(sparse), MOST_THRESHOLDS))

    def reached(factor: float) -> float:
        return sparsity_of(layers, most_zeros_at(layers, sparse, factor, start))

    number = bisect_left(applied, sparse.target, key=reached)
    return number + 1 if number < len(applied) else None


def sparsity_of(layers: Sequence[CountedLayer], zeros: Zeros) -> float:
    """Zeros over weights of all layers that count."""
    found = sum(int(zeros[layer.name].sum()) for layer in layers)
    return found / max(sum(layer.weights for layer in layers), 1)


def most_zeros_at(
    layers: Sequence[CountedLayer], sparse: SparseSettings, factor: float, start: Zeros
) -> Zeros:
    """The zeros after a threshold of ``factor``, at most; ``start`` were there before."""
    import numpy as np

    after = dict(start)
    common: list[CountedLayer] = []
    for layer in layers:
        if why_not_pruned(layer, sparse) is not None:
            continue
        before, size = start[layer.name], layer.weights // layer.outputs
        fraction = layer_fraction(layer, sparse, factor)
        if sparse.n_of_m is not None:
            kept, together = sparse.n_of_m
            most = size // together * min(together - kept, most_zeros(together, fraction))
            # Zeros that are there already may lie together in one block, and the pattern adds to the others.
            after[layer.name] = np.minimum(before + most, size)
        elif sparse.by == "channel":
            after[layer.name] = np.maximum(before, most_zeros(size, fraction))
        elif sparse.by == "layer" or target_of(layer, sparse) is not None:
            most = max(int(before.sum()), most_zeros(layer.weights, fraction))
            after[layer.name] = _in_few_channels(most, layer)
        else:
            common.append(layer)
    if common:
        after |= _most_in_common(common, factor, start)
    return after


def _most_in_common(
    layers: Sequence[CountedLayer], factor: float, start: Zeros
) -> dict[str, NDArray[np.int64]]:
    """The zeros of layers that share one threshold: together at most this many, in as few as possible."""
    zeros = sum(int(start[layer.name].sum()) for layer in layers)
    left = max(zeros, zeros_in_common(sum(layer.weights for layer in layers), factor))
    after = {}
    for layer in layers:
        after[layer.name] = _in_few_channels(left, layer)
        left = max(0, left - layer.weights)
    return after


def _in_few_channels(zeros: int, layer: CountedLayer) -> NDArray[np.int64]:
    """So many zeros in as few channels as possible: thresholds by channel then add the most."""
    import numpy as np

    size = layer.weights // layer.outputs
    return np.clip(zeros - size * np.arange(layer.outputs), 0, size)


def no_zeros(layers: Sequence[CountedLayer]) -> Zeros:
    """Of weights that are random."""
    import numpy as np

    return {layer.name: np.zeros(layer.outputs, np.int64) for layer in layers}


def zeros_in(weights: Path, layers: Sequence[CountedLayer]) -> Zeros:
    """The zeros in a weight file; none in a layer that it lacks or has in another shape.

    Raises:
        UserError: the file is missing, cut off or not a weight file.
    """
    import numpy as np

    from caffe_jacinto.caffemodel.storage import read_weights

    stored, found = read_weights(weights), dict(no_zeros(layers))
    for layer in layers:
        blobs = stored.get(layer.name)
        if blobs and blobs[0].size == layer.weights:
            channels = layer.outputs_first(blobs[0].reshape(layer.shape)).reshape(layer.outputs, -1)
            found[layer.name] = np.count_nonzero(channels == 0, axis=1)
    return found
