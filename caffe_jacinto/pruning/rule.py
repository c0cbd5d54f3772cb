"""The published pruning rule: which weights a threshold zeroes, and the schedule of thresholds.

These are caffe-jacinto's ``sparsity_*`` solver fields. At iterations ``i >= start_iter`` that ``step_iter``
divides, while the sparsity reached is below the target and the factor is at most min(target + 0.15, 0.95),
the factor grows by ``step_factor``, and a threshold zeroes that fraction of the smallest weights. The
published log's first threshold, from a ``sparsity_start_factor`` of 0, says
``Finding and applying sparsity: 0.01``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from caffe_jacinto.caffemodel.net_file import NetLayer, NewLayer
    from caffe_jacinto.prototxt.dialects import Dialect
    from caffe_jacinto.recipes.model import SparseSettings


By = Literal["channel", "layer"]
"""What has a threshold of its own."""

MIN_CHANNELS = 32
"""A layer with fewer inputs and fewer outputs than this is not pruned; with one of them fewer, by half."""


def prune(
    weights: NDArray[np.float32], group: int, factor: float, *, by: By, maxratio: float, value_max: float
) -> bool:
    """Apply a threshold of ``factor`` to the ``weights`` of a convolution, in place.

    Returns whether the rule prunes this layer at all.
    """
    import numpy as np

    if not is_pruned(weights.shape, group):
        return False
    fraction = layer_fraction(weights.shape, group, factor)
    with np.errstate(invalid="ignore"):  # a weight that is not a number stays what it is
        small = small_weights(weights, fraction, maxratio=maxratio, value_max=value_max, by=by)
    weights[small] = 0
    return True


def is_pruned(shape: tuple[int, ...], group: int) -> bool:
    """Whether the rule prunes a convolution with weights of ``shape``: outputs, inputs / group, kernel."""
    if len(shape) != 4:
        return False
    outputs, inputs = shape[0], shape[1] * group
    large_kernel = shape[2] > 2 and shape[3] > 2
    return max(inputs, outputs) >= MIN_CHANNELS and group < outputs and large_kernel


def layer_fraction(shape: tuple[int, ...], group: int, factor: float) -> float:
    """The fraction of a pruned layer's weights to zero when the schedule is at ``factor``."""
    outputs, inputs = shape[0], shape[1] * group
    return factor / 2 if min(inputs, outputs) < MIN_CHANNELS else factor


def most_zeros(together: int, fraction: float) -> int:
    """How many of ``together`` weights one threshold may zero: at most this ``fraction`` of them."""
    # A product such as 0.29 * 100 must not fall below 29 by its rounding.
    return int(fraction * together + 1e-6)


def small_weights(
    weights: NDArray[np.float32],
    fraction: float,
    *,
    maxratio: float,
    value_max: float,
    by: By = "channel",
) -> NDArray[np.bool_]:
    """True where a weight is at or below the threshold of its output channel, or of the layer.

    The first axis of ``weights`` is the outputs.
    """
    import numpy as np

    magnitudes = np.abs(weights).reshape(weights.shape[0] if by == "channel" else 1, -1)
    together = magnitudes.shape[1]
    most = most_zeros(together, fraction)
    cap = np.minimum(np.float32(value_max), np.float32(maxratio) * magnitudes.max(axis=1, keepdims=True))
    small = magnitudes <= cap
    if most < together:
        # The threshold stays below the magnitude number `most`, from 0: it and its equals would be too many.
        small &= magnitudes < np.partition(magnitudes, most, axis=1)[:, most : most + 1]
    return np.asarray(small.reshape(weights.shape))


def sparsify(
    source: Path,
    target: Path,
    dialect: Dialect,
    *,
    factor: float,
    by: By,
    maxratio: float,
    value_max: float,
) -> list[str]:
    """Write ``source`` to ``target`` with the weights set to zero that a threshold of ``factor`` zeroes.

    This tries the rule on a weight file, without training. One layer's weights are in memory at a time.
    Returns the names of the layers that were pruned.

    Raises:
        UserError: the file is missing, cut off or not a weight file.
    """
    from caffe_jacinto.caffemodel.net_file import NewLayer, open_net, write_net
    from caffe_jacinto.netspec.graph import counted_convolutions, groups_of, nodes_of

    pruned: list[str] = []

    def new_layers(layers: list[NetLayer]) -> Iterator[NewLayer]:
        counted = set(counted_convolutions(nodes_of(layer.header for layer in layers)))
        for layer in layers:
            blobs = [(layer.view, blob) for blob in layer.blobs]
            group = groups_of(layer.header)
            weights = layer.values(0) if layer.name in counted and blobs else None
            if weights is not None and prune(
                weights, group, factor, by=by, maxratio=maxratio, value_max=value_max
            ):
                pruned.append(layer.name)
                yield NewLayer(layer.header, [weights, *blobs[1:]])
            else:
                yield NewLayer(layer.header, blobs)

    with open_net(source, dialect) as (name, layers):
        write_net(target, name, new_layers(layers), dialect)
    return pruned


def factor_cap(target: float) -> float:
    """The factor above which no further threshold is applied."""
    return min(target + 0.15, 0.95)


def step_iterations(sparse: SparseSettings, max_iter: int) -> range:
    """The iterations (counted from 0) below ``max_iter`` after whose update a threshold may be applied."""
    first = -(-sparse.start_iter // sparse.step_iter) * sparse.step_iter
    return range(first, max_iter, sparse.step_iter)


def is_step(sparse: SparseSettings, iteration: int) -> bool:
    """Whether a threshold may be applied after the update of ``iteration`` (counted from 0)."""
    return iteration in step_iterations(sparse, iteration + 1)


def next_factor(sparse: SparseSettings, factor: float, achieved: float) -> float | None:
    """The factor to apply now, in [0, 1], given the one applied before; None at the end of the schedule."""
    # The sum of many steps of 0.01 must not end above the cap by its rounding alone.
    if achieved >= sparse.target or factor > factor_cap(sparse.target) + 1e-9:
        return None
    return min(round(factor + sparse.step_factor, 9), 1.0)


def factors(sparse: SparseSettings) -> Iterator[float]:
    """The factors of all thresholds of the schedule, in order, where the target is never reached."""
    factor = next_factor(sparse, sparse.start_factor, 0.0)
    while factor is not None:
        yield factor
        factor = next_factor(sparse, factor, 0.0)
