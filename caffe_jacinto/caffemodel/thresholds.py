"""Which weights of a convolution become zero, by exact thresholds per output channel, or per layer.

Rule of the published incremental, channel-wise sparsification. In each output channel the threshold is the
largest t such that at most the given fraction of the channel's |w| is <= t, and t <= min(value_max, maxratio
x max |w|); every |w| <= t becomes zero. The fork scans for t; an order statistic gives it exactly. By layer,
one such t is taken over all of the layer's weights, so that channels of small weights lose more than others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

By = Literal["channel", "layer"]
"""What has a threshold of its own."""

MIN_CHANNELS = 32
"""A layer with fewer inputs and fewer outputs than this takes no part; with one of them fewer, by half."""


def takes_part(shape: tuple[int, ...], group: int) -> bool:
    """Whether a convolution with weights of ``shape`` (outputs, inputs / group, height, width) is thinned."""
    if len(shape) != 4:
        return False
    outputs, inputs = shape[0], shape[1] * group
    large_kernel = shape[2] > 2 and shape[3] > 2
    return max(inputs, outputs) >= MIN_CHANNELS and group < outputs and large_kernel


def layer_fraction(shape: tuple[int, ...], group: int, factor: float) -> float:
    """The fraction to zero in a layer that takes part, when the ramp is at ``factor``."""
    outputs, inputs = shape[0], shape[1] * group
    return factor / 2 if min(inputs, outputs) < MIN_CHANNELS else factor


def small_weights(
    weights: NDArray[np.float32],
    fraction: float,
    *,
    maxratio: float,
    value_max: float,
    by: By = "channel",
) -> NDArray[np.bool_]:
    """True where a weight is at or below the threshold of its output channel, or of the layer.

    ``weights`` has outputs in front.
    """
    import numpy as np

    magnitudes = np.abs(weights).reshape(weights.shape[0] if by == "channel" else 1, -1)
    together = magnitudes.shape[1]
    # At most this many of them; a product such as 0.29 * 100 must not fall below 29 by its rounding.
    most = int(fraction * together + 1e-6)
    cap = np.minimum(np.float32(value_max), np.float32(maxratio) * magnitudes.max(axis=1, keepdims=True))
    small = magnitudes <= cap
    if most < together:
        # The threshold stays below the magnitude number `most`, from 0: it and its equals would be too many.
        small &= magnitudes < np.partition(magnitudes, most, axis=1)[:, most : most + 1]
    return np.asarray(small.reshape(weights.shape))
