"""The pruning rule: which weights of the layers that it takes a threshold zeroes.

The published rule has a threshold for each output channel: the largest t such that at most the schedule's
fraction of the channel's |w| is at or below t, and t is at most two caps. Beside it, what shares a threshold
may be a layer or the whole network; and with a pattern ``n:m`` there is none: of each m consecutive input
channels the smallest weights go, no more than m - n, and the caps do not apply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from caffe_jacinto.pruning.layers import CountedLayer, layer_fraction, target_of, why_not_pruned

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from caffe_jacinto.recipes.model import SparseSettings

By = Literal["channel", "layer"]
"""What has a threshold of its own."""

CHUNK = 1 << 22
"""Weights that are ranked in their patterns at a time."""


def pruned_weights(
    layers: Sequence[CountedLayer],
    sparse: SparseSettings,
    factor: float,
    read: Callable[[str], NDArray[np.float32]],
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The layers that the rule prunes, and copies of their weights after a threshold of ``factor``.

    ``read`` gives a layer's weights. One layer's are in memory at a time; where the network has one
    threshold, the magnitudes of all are, once.
    """
    import numpy as np

    taken = [layer for layer in layers if why_not_pruned(layer, sparse) is None]
    caps = {"maxratio": sparse.threshold_maxratio, "value_max": sparse.threshold_value_max}
    common = [layer for layer in taken if sparse.by == "network" and target_of(layer, sparse) is None]
    with np.errstate(invalid="ignore"):  # a weight that is not a number stays what it is
        threshold = None
        if common:
            flat = [np.abs(read(layer.name)).reshape(-1) for layer in common]
            together = np.concatenate(flat)[np.newaxis]
            del flat
            share = zeros_in_common(together.size, factor) / together.size
            threshold = _thresholds(together, share, **caps)
            del together
        for layer in taken:
            weights = np.array(read(layer.name), order="C")
            rows = layer.outputs_first(weights)
            fraction = layer_fraction(layer, sparse, factor)
            if sparse.n_of_m is not None:
                small = outside_pattern(rows, fraction, *sparse.n_of_m)
            elif threshold is not None and layer in common:
                small = threshold.small(np.abs(rows).reshape(1, -1)).reshape(rows.shape)
            else:
                small = small_weights(
                    rows, fraction, by="channel" if sparse.by == "channel" else "layer", **caps
                )
            rows[small] = 0
            yield layer.name, weights


def most_zeros(together: int, fraction: float) -> int:
    """How many of ``together`` weights one threshold may zero: at most this ``fraction`` of them."""
    # A product such as 0.29 * 100 must not fall below 29 by its rounding.
    return int(fraction * together + 1e-6)


def zeros_in_common(together: int, factor: float) -> int:
    """How many weights the threshold of a network zeroes: rounded up, so that ``factor`` is reached."""
    return math.ceil(factor * together - 1e-6)


class _Thresholds(NamedTuple):
    """What the magnitudes in each row must be to become zero."""

    cap: NDArray[np.float32]
    """Not above this; one number a row."""

    below: NDArray[np.float32] | None
    """And below this, if not all may become zero."""

    def small(self, magnitudes: NDArray[np.float32]) -> NDArray[np.bool_]:
        found = magnitudes <= self.cap
        if self.below is not None:
            found &= magnitudes < self.below
        return found


def _thresholds(
    magnitudes: NDArray[np.float32], fraction: float, *, maxratio: float, value_max: float
) -> _Thresholds:
    """The threshold of each row of ``magnitudes``."""
    import numpy as np

    together = magnitudes.shape[1]
    most = most_zeros(together, fraction)
    cap = np.minimum(np.float32(value_max), np.float32(maxratio) * magnitudes.max(axis=1, keepdims=True))
    if most >= together:
        return _Thresholds(cap, None)
    # The threshold stays below the magnitude number `most`, from 0: it and its equals would be too many.
    return _Thresholds(cap, np.partition(magnitudes, most, axis=1)[:, most : most + 1])


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
    found = _thresholds(magnitudes, fraction, maxratio=maxratio, value_max=value_max).small(magnitudes)
    return np.asarray(found.reshape(weights.shape))


def outside_pattern(
    weights: NDArray[np.float32], fraction: float, kept: int, together: int
) -> NDArray[np.bool_]:
    """True for the smallest weights of each ``together`` consecutive input channels.

    These are ``fraction`` of them, rounded down, but no more than leaves ``kept``; of equal ones the first.
    The axes of ``weights`` are outputs, inputs (a multiple of ``together``), kernel.
    """
    import numpy as np

    zeros = min(together - kept, most_zeros(together, fraction))
    found = np.zeros(weights.shape, bool)
    step = max(1, CHUNK // max(weights[:1].size, 1))
    for start in range(0, len(weights), step):
        part = np.moveaxis(np.abs(weights[start : start + step]), 1, -1)
        blocks = part.reshape(*part.shape[:-1], -1, together)
        smallest = np.argsort(blocks, axis=-1, kind="stable")[..., :zeros]
        small = np.zeros(blocks.shape, bool)
        np.put_along_axis(small, smallest, values=True, axis=-1)
        found[start : start + step] = np.moveaxis(small.reshape(part.shape), -1, 1)
    return found
