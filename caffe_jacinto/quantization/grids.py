"""Grids: the values that a quantized number can take, and how one is chosen for a range.

A number ``q`` of a grid stands for ``(q - offset) * step``; ``q`` is whole and from ``low`` to ``high``.
Values are rounded to the nearest, halves to the even one, as ONNX's QuantizeLinear does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import frexp, inf, isfinite, ldexp
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.float32]
    Steps = NDArray[np.float32]

_CANDIDATES = np.linspace(0.3, 1.0, 57)
"""Parts of the largest value that are tried as a range."""

_LEAST_STEP = 2.0**-100
"""Smaller ones do not fit into float32, nor do products of them."""

_LARGEST = 2.0**100
"""Larger values do not fit into float32 once they are divided by a step."""

_NO_RANGE = 1.0
"""The largest value that a grid is made for where all values are zero."""


@dataclass(frozen=True)
class Grid:
    """The values that a quantized number can take."""

    steps: Steps
    """One number, or one for each output channel."""

    low: float
    high: float
    offset: float = 0.0
    axis: int = 0
    """Where there are several steps: the axis of the channels."""

    @property
    def step(self) -> float:
        """The step where there is only one."""
        (step,) = self.steps.tolist()
        return float(step)

    @property
    def signed(self) -> bool:
        return self.low < 0

    @property
    def bits(self) -> int:
        """The bits that its numbers take, which have limits."""
        return int(self.high).bit_length() + (1 if self.signed else 0)

    def with_steps_from(self, least: NDArray[np.float64] | float, power_of_two: bool) -> Grid:
        """The same with steps of at least ``least``: one number, or one for each step."""
        short = self.steps < least
        if not short.any():
            return self
        steps = np.broadcast_to(least, self.steps.shape)
        if power_of_two:
            steps = np.array([_power(step) for step in steps.tolist()])
        return replace(self, steps=np.where(short, steps, self.steps).astype(np.float32))

    def numbers(self, values: Values) -> NDArray[np.float32]:
        """The grid's number nearest to each of ``values``."""
        scaled = values / self._over(values) + np.float32(self.offset)
        result: Values = np.clip(np.rint(scaled), self.low, self.high).astype(np.float32)
        return result

    def values(self, numbers: Values) -> Values:
        """What each of ``numbers`` stands for."""
        result: Values = ((numbers - np.float32(self.offset)) * self._over(numbers)).astype(np.float32)
        return result

    def rounded(self, values: Values) -> Values:
        """The grid's value nearest to each of ``values``."""
        return self.values(self.numbers(values))

    def _over(self, values: Values) -> Steps:
        """The steps in a shape that broadcasts over ``values``."""
        if self.steps.size == 1:
            return self.steps.reshape(())
        shape = [1] * values.ndim
        shape[self.axis] = -1
        return self.steps.reshape(shape)


def activation_grid(low: float, high: float, bits: int, *, power_of_two: bool = False) -> Grid:
    """The grid of activations from ``low`` to ``high``; unsigned where nothing is negative.

    A signed grid of b bits uses -2^(b-1) too, so that pixels less 128 have a step of exactly 1.
    """
    if low >= 0:
        least, most = 0, 2**bits - 1
        step = high / most
    else:
        least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        step = max(low / least, high / most)
    if step == 0:
        step = _NO_RANGE / most
    return Grid(_single(_power(step) if power_of_two else step), least, most)


def weight_grid(
    weights: Values,
    bits: int,
    *,
    axis: int | None = None,
    power_of_two: bool = False,
    squared_error: bool = False,
    percentile: float = 100.0,
) -> Grid:
    """The symmetric grid of ``weights``, on which zero is exactly zero.

    Args:
        axis: that of the output channels, for a step for each of them; None: one step.
        squared_error: the range whose squared error is least, not the largest value.
        percentile: the part of the magnitudes that the range covers, in percent.
    """
    rows = (
        weights.reshape(1, -1)
        if axis is None
        else np.moveaxis(weights, axis, 0).reshape(len_of(weights, axis), -1)
    )
    sizes = np.abs(rows)
    most, largest = sizes.max(axis=1), 2 ** (bits - 1) - 1
    reach = most if percentile >= 100 else np.percentile(sizes, percentile, axis=1)
    reach = np.where(reach > 0, reach, most)
    if squared_error:
        reach = np.where(reach > 0, reach, _NO_RANGE)
        reach = reach * _best_parts(rows, reach, largest, power_of_two)
    return symmetric_grid(reach, bits, axis=axis, power_of_two=power_of_two)


def symmetric_grid(
    reach: Values | NDArray[np.float64], bits: int, *, axis: int | None = None, power_of_two: bool = False
) -> Grid:
    """The symmetric grid for values up to ``reach``: one number, or one for each channel along ``axis``."""
    most = 2 ** (bits - 1) - 1
    steps = np.where(reach > 0, reach, _NO_RANGE) / most
    if power_of_two:
        steps = np.array([_power(step) for step in steps.tolist()])
    return Grid(np.maximum(steps, _LEAST_STEP).astype(np.float32), -most, most, axis=axis or 0)


def len_of(values: Values, axis: int) -> int:
    return int(values.shape[axis])


def _best_parts(
    rows: Values, reach: NDArray[np.float64], most: int, power_of_two: bool
) -> NDArray[np.float64]:
    """For each row, the part of its ``reach`` that as a range has the least squared error."""
    best, parts = np.full(len(rows), inf), np.ones(len(rows))
    tried = np.array([0.25, 0.5, 1.0]) if power_of_two else _CANDIDATES
    for part in tried:
        steps = reach * part / most
        if power_of_two:
            steps = np.array([_power(step) for step in steps.tolist()])
        grid = Grid(np.maximum(steps, _LEAST_STEP).astype(np.float32), -most, most)
        errors = np.square(grid.rounded(rows) - rows).sum(axis=1, dtype=np.float64)
        better = errors < best
        best, parts = np.where(better, errors, best), np.where(better, part, parts)
    return parts


def offset_grid(low: float, high: float, bits: int, *, power_of_two: bool = False) -> Grid:
    """The fork's grid with an offset: from the least to the largest value; the offset is not rounded.

    Scale s = (2^b - 1) / (max - min), or a power of two: 2^(b - ceil(log2(max - min))); offset -min x s
    (caffe-jacinto, branch caffe-0.17).
    """
    most, size = 2**bits - 1, high - low if high > low else abs(high) or _NO_RANGE
    scale = 2.0**bits / _power(size) if power_of_two else most / size
    return Grid(_single(1 / scale), 0, most, offset=-low * scale)


def magnitude_grid(
    low: float, high: float, bits: int, *, clipped: bool = True, power_of_two: bool = False
) -> Grid:
    """The fork's grid without an offset: s = (2^b - 1) / max|x| unsigned, (2^(b-1) - 1) / max|x| signed.

    A power of two: 2^(b - ceil(log2(max|x|))), and half of that where it is signed. ``clipped``: biases are
    not.
    """
    signed = low < 0
    largest = max(abs(low), abs(high)) or _NO_RANGE
    step = largest / (2 ** (bits - 1) - 1 if signed else 2**bits - 1)
    if power_of_two:
        step = _power(largest) / 2.0 ** (bits - 1 if signed else bits)
    if not clipped:
        return Grid(_single(step), -inf, inf)
    if signed:
        return Grid(_single(step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return Grid(_single(step), 0, 2**bits - 1)


def is_range(low: float, high: float) -> bool:
    """Whether these are the ends of a range whose numbers float32 can hold."""
    return isfinite(low) and isfinite(high) and -_LARGEST <= low <= high <= _LARGEST


def _power(step: float) -> float:
    """The smallest power of two that is at least ``step``."""
    mantissa, exponent = frexp(step)
    return ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)


def _single(step: float) -> Steps:
    return np.array([max(step, _LEAST_STEP)], np.float32)
