"""Regrowth: in a network that trains sparse, weights change places while their number stays.

RigL (Evci, Gale, Menick, Castro and Elsen 2020, "Rigging the Lottery: Making All Tickets Winners",
arXiv:1911.11134, section 3 and algorithm 1). In each layer the share f of the weights that are left, those of
the smallest magnitudes, are dropped, and as many grow where, among all that are zero then, the loss has the
largest gradients. What has grown starts at 0; what was dropped and grows at once keeps its value. The share
falls with the iterations t as

    f(t) = alpha / 2 (1 + cos(pi t / T))

Here alpha is ``regrow_fraction``; t counts from ``start_iter``; and T is where ``regrow_until``, a share of
the stage's iterations, ends. In the paper the network is sparse from its first iteration. Here a stage
starts from trained weights: the schedule of thresholds makes it sparse, and regrowth begins when that has
ended. With ``step_factor`` as large as ``target``, nearly all at once, only the start differs from the paper.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from caffe_jacinto.recipes.model import SparseSettings

    Values = NDArray[np.float32]
    Flags = NDArray[np.bool_]


def regrow_share(sparse: SparseSettings, iteration: int, max_iter: int) -> float:
    """f after the update of ``iteration`` (counted from 0) of ``max_iter``; 0 when regrowth has ended."""
    end = sparse.regrow_until * max_iter
    if iteration >= end:
        return 0.0
    passed = (iteration - sparse.start_iter) / (end - sparse.start_iter)
    return sparse.regrow_fraction / 2 * (1 + math.cos(math.pi * passed))


def regrown(weights: Values, free: Flags, gradients: Values, share: float) -> Flags:
    """The weights that are free after the ``share`` of the ``free`` ones has changed places.

    All have the shape of the layer's weights. Of equal magnitudes the first in memory is dropped, or grows:
    the result is the same on every machine.
    """
    import numpy as np

    # A product such as 0.3 * 10 must not fall below 3 by its rounding.
    count = int(share * int(np.count_nonzero(free)) + 1e-6)
    flat = free.reshape(-1).copy()
    candidates = np.flatnonzero(flat)
    flat[candidates[_smallest(np.abs(weights.reshape(-1)[candidates]), count)]] = False
    candidates = np.flatnonzero(~flat)
    flat[candidates[_smallest(-np.abs(gradients.reshape(-1)[candidates]), count)]] = True
    after: Flags = flat.reshape(free.shape)
    return after


def _smallest(values: Values, count: int) -> NDArray[np.int64]:
    """The places of the ``count`` smallest of ``values``; of equal ones, of the first."""
    import numpy as np

    if count == 0:
        return np.zeros(0, np.int64)
    last = np.partition(values, count - 1)[count - 1]
    below = np.flatnonzero(values < last)
    return np.concatenate([below, np.flatnonzero(values == last)[: count - len(below)]])
