"""Ranges of activations, from what passes over calibration images show: least, largest, and a histogram.

The memory is that of one histogram a blob, whatever the number of images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Literal

import numpy as np

from caffe_jacinto.quantization.grids import activation_grid, is_range
from caffe_jacinto.quantization.schemes import TRAINED, MovingRange, RangeMethod

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.float32]
    Counts = NDArray[np.int64]

BINS = 4096
"""Of a histogram, which is symmetric about zero."""

_PARTS = np.linspace(0.2, 1.0, 81)
"""Parts of the largest value that are tried as a range."""


@dataclass
class Histogram:
    """How often values occur, over a span that doubles as larger ones come."""

    span: float = 0.0
    """The largest magnitude that it holds."""

    counts: Counts = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, values: Values) -> None:
        """Count ``values``, which are finite."""
        largest = float(np.abs(values).max(initial=0.0))
        if largest == 0:
            largest = self.span or 1.0
        if not self.span:
            self.span = largest
        while largest > self.span:
            self._double()
        # Float32 is exact enough: a value on a bin's edge may count in either.
        bins = ((values * np.float32(1 / self.span) + 1) * (BINS / 2)).astype(np.int32)
        self.counts += np.bincount(np.clip(bins, 0, BINS - 1), minlength=BINS)

    def _double(self) -> None:
        quarter = BINS // 4
        pairs = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.zeros(BINS, np.int64)
        self.counts[quarter : quarter + BINS // 2] = pairs
        self.span *= 2

    @property
    def centres(self) -> NDArray[np.float64]:
        """The value in the middle of each bin."""
        middles: NDArray[np.float64] = ((np.arange(BINS) + 0.5) * 2 / BINS - 1) * self.span
        return middles


@dataclass
class Range:
    """What one blob has had so far."""

    low: float = inf
    high: float = -inf
    histogram: Histogram | None = None

    def add(self, low: float, high: float, values: Values | None = None) -> None:
        """Take in a batch: its least and largest value, and a sample of its values."""
        # What is not a number stays, for `is_range` to find; min and max would pass over it.
        self.low, self.high = float(np.minimum(self.low, low)), float(np.maximum(self.high, high))
        # A value that is not finite is found in `low` and `high`, and has no place in a histogram.
        if values is not None and self.histogram is not None and is_range(low, high):
            self.histogram.add(values)

    def moved(self, low: float, high: float, moving: MovingRange) -> None:
        """Take in a batch as the fork does: the first one whole, from then on a moving average."""
        low, high = low * moving.expansion, high * moving.expansion
        if self.low == inf:
            self.low, self.high = low, high
        else:
            self.low += moving.pace * (low - self.low)
            self.high += moving.pace * (high - self.high)

    def chosen(
        self, method: RangeMethod | Literal["trained"], percentile: float, bits: int, *, power_of_two: bool
    ) -> tuple[float, float]:
        """The range to quantize: least and largest value."""
        histogram = self.histogram
        if method in ("minmax", TRAINED) or histogram is None or not is_range(self.low, self.high):
            return self.low, self.high
        if method == "percentile":
            return self._percentile(histogram, percentile)
        return self._least_error(histogram, bits, power_of_two)

    def _percentile(self, histogram: Histogram, percentile: float) -> tuple[float, float]:
        """Without the outermost values; where nothing is negative, only the largest are left out."""
        total = histogram.counts.sum()
        beyond = total * (1 - percentile / 100)
        if self.low < 0:
            beyond /= 2
        width = 2 * histogram.span / BINS
        below = np.cumsum(histogram.counts)
        first = int(np.searchsorted(below, beyond, side="right"))
        last = int(np.searchsorted(below, total - beyond, side="left"))
        low = max(self.low, -histogram.span + first * width) if self.low < 0 else self.low
        return low, min(self.high, -histogram.span + (last + 1) * width)

    def _least_error(self, histogram: Histogram, bits: int, power_of_two: bool) -> tuple[float, float]:
        used = np.flatnonzero(histogram.counts)
        values, counts = histogram.centres[used].astype(np.float32), histogram.counts[used]
        best, found = inf, (self.low, self.high)
        for part in (0.125, 0.25, 0.5, 1.0) if power_of_two else _PARTS:
            low, high = self.low * part, self.high * part
            grid = activation_grid(low, high, bits, power_of_two=power_of_two)
            error = float(np.square(grid.rounded(values) - values, dtype=np.float64) @ counts)
            # An equal error speaks for the larger range: nothing is clipped.
            if error <= best:
                best, found = error, (low, high)
        return found
