"""How sparse a schedule of thresholds can make a network before its stage ends, found without training.

A threshold zeroes at most the schedule's factor of the weights that it is for (an output channel's, or a
layer's), and zeros that are there already stay. So what is counted here is the most that there can be; the
caps of the thresholds (`rule.small_weights`) only lower it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.pruning.rule import factors, is_pruned, layer_fraction, most_zeros, step_iterations

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from caffe_jacinto.recipes.model import SparseSettings

    Zeros = Mapping[str, NDArray[np.int64]]
    """For each convolution, the zeros that each of its output channels has at most."""

MOST_THRESHOLDS = 100_000
"""A schedule in finer steps than this is followed no further."""


@dataclass(frozen=True)
class CountedConvolution:
    """A convolution whose weights count as sparsity."""

    name: str
    shape: tuple[int, ...]
    """Of its weights: outputs, inputs / group, kernel."""

    group: int
    learns: bool
    """False: training leaves it as it is, and so does pruning."""

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def is_pruned(self) -> bool:
        """Whether thresholds zero weights of it."""
        return self.learns and is_pruned(self.shape, self.group)


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
    """Zeros over weights of all convolutions, at most."""


def reach(
    convolutions: Sequence[CountedConvolution], sparse: SparseSettings, max_iter: int | None, start: Zeros
) -> Reach:
    """The most that ``sparse`` can reach in ``max_iter`` iterations (None: as many as it takes).

    ``start`` has the zeros at the start of the stage.
    """
    steps = MOST_THRESHOLDS if max_iter is None else len(step_iterations(sparse, max_iter))
    applied = list(islice(factors(sparse), min(steps, MOST_THRESHOLDS)))
    zeros = most_zeros_at(convolutions, sparse, applied[-1], start) if applied else dict(start)
    factor = applied[-1] if applied else sparse.start_factor
    return Reach(steps, len(applied), factor, zeros, sparsity_of(convolutions, zeros))


def thresholds_needed(
    convolutions: Sequence[CountedConvolution], sparse: SparseSettings, start: Zeros
) -> int | None:
    """How many thresholds the target takes at least; None where the schedule ends below it."""
    if sparsity_of(convolutions, start) >= sparse.target:
        return 0
    applied = list(islice(factors(sparse), MOST_THRESHOLDS))

    def reached(factor: float) -> float:
        return sparsity_of(convolutions, most_zeros_at(convolutions, sparse, factor, start))

    number = bisect_left(applied, sparse.target, key=reached)
    return number + 1 if number < len(applied) else None


def sparsity_of(convolutions: Sequence[CountedConvolution], zeros: Zeros) -> float:
    """Zeros over weights of all convolutions."""
    found = sum(int(zeros[convolution.name].sum()) for convolution in convolutions)
    return found / max(sum(convolution.weights for convolution in convolutions), 1)


def most_zeros_at(
    convolutions: Sequence[CountedConvolution], sparse: SparseSettings, factor: float, start: Zeros
) -> Zeros:
    """The zeros after a threshold of ``factor``, at most; ``start`` were there before."""
    import numpy as np

    after = dict(start)
    for convolution in convolutions:
        if not convolution.is_pruned:
            continue
        before = start[convolution.name]
        fraction = layer_fraction(convolution.shape, convolution.group, factor)
        if sparse.by == "channel":
            most = most_zeros(convolution.weights // convolution.shape[0], fraction)
            after[convolution.name] = np.maximum(before, most)
        else:
            most = max(int(before.sum()), most_zeros(convolution.weights, fraction))
            after[convolution.name] = _in_few_channels(most, convolution)
    return after


def _in_few_channels(zeros: int, convolution: CountedConvolution) -> NDArray[np.int64]:
    """So many zeros in as few channels as possible: thresholds by channel then add the most."""
    import numpy as np

    size = convolution.weights // convolution.shape[0]
    return np.clip(zeros - size * np.arange(convolution.shape[0]), 0, size)


def no_zeros(convolutions: Sequence[CountedConvolution]) -> Zeros:
    """Of weights that are random."""
    import numpy as np

    return {convolution.name: np.zeros(convolution.shape[0], np.int64) for convolution in convolutions}


def zeros_in(weights: Path, convolutions: Sequence[CountedConvolution]) -> Zeros:
    """The zeros in a weight file; none in a layer that it lacks or has in another shape.

    Raises:
        UserError: the file is missing, cut off or not a weight file.
    """
    import numpy as np

    from caffe_jacinto.caffemodel.storage import read_weights

    stored, found = read_weights(weights), dict(no_zeros(convolutions))
    for convolution in convolutions:
        blobs = stored.get(convolution.name)
        if blobs and blobs[0].size == convolution.weights:
            channels = blobs[0].reshape(convolution.shape[0], -1)
            found[convolution.name] = np.count_nonzero(channels == 0, axis=1)
    return found
