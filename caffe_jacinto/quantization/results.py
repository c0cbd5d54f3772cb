"""What a quantization has cost, in figures: the network's accuracy, and each unit's signal and noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, log10
from typing import TYPE_CHECKING

import numpy as np

from caffe_jacinto.quantization.grids import Grid
from caffe_jacinto.quantization.network import Network, Quantization
from caffe_jacinto.quantization.ranges import Range
from caffe_jacinto.quantization.units import Unit

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Accuracy:
    """The share of images whose class is the best one, and one of the best five."""

    top1: float
    top5: float | None
    """None where there are fewer than five classes."""

    images: int
    loss: float
    """The mean softmax loss."""


@dataclass
class Energy:
    """The energies of a signal and of its noise, summed over batches."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, signal: float, noise: float) -> None:
        self.signal += signal
        self.noise += noise

    @property
    def decibels(self) -> float | None:
        """10 log10(signal / noise); infinite without noise, None where there is no signal."""
        if not self.signal:
            return None
        return 10 * log10(self.signal / self.noise) if self.noise else inf


@dataclass
class Result:
    """A quantized network and what is known of it."""

    network: Network
    quantization: Quantization
    ranges: Mapping[str, Range]
    """What the calibration has seen, by unit."""

    calibrated_on: int = 0
    """Images."""

    noise: dict[str, Energy] = field(default_factory=dict)
    noise_images: int = 0
    """Images over which `noise` was measured."""

    before: Accuracy | None = None
    """In float32."""

    after: Accuracy | None = None
    agreement: float | None = None
    """The share of images for which both give the same best class."""

    alone: dict[str, float] = field(default_factory=dict)
    """Top-1 with only this unit quantized."""


@dataclass(frozen=True)
class Row:
    """A unit in the table."""

    layer: str
    type: str
    weight_bits: int | None
    weight_range: float | None
    """The largest magnitude."""

    weight_scales: tuple[float, float] | None
    """The smallest and the largest of its channels."""

    weight_decibels: float | None
    zeros: float | None
    """The share of the quantized weights that are zero."""

    output_bits: int | None
    low: float | None
    high: float | None
    """What the grid of its output reaches."""

    signed: bool | None
    output_scale: float | None
    output_decibels: float | None
    top1_alone: float | None
    """Top-1 with only this unit quantized, less that in float32."""


def rows_of(result: Result) -> list[Row]:
    """The units that have weights or whose output is quantized, in order."""
    return [
        _row(result, unit) for unit in result.network.units if unit.weighted or unit.output == "quantized"
    ]


def weight_noise(result: Result, unit: Unit) -> Energy:
    """The energies of a unit's weights and of what quantization changes in them."""
    weights = result.network.weights(unit)
    change = result.quantization.weights[unit.name].rounded(weights) - weights
    return Energy(_energy(weights), _energy(change))


def _row(result: Result, unit: Unit) -> Row:
    weights = result.quantization.weights.get(unit.name)
    output = result.quantization.outputs.get(unit.name)
    alone = result.alone.get(unit.name)
    bits = result.network.bits_of(unit)
    values = result.network.weights(unit) if weights is not None else None
    low, high = reach(output) if output is not None else (None, None)
    return Row(
        unit.name,
        unit.type,
        bits.weights if weights is not None else None,
        float(np.abs(values).max()) if values is not None else None,
        (float(weights.steps.min()), float(weights.steps.max())) if weights is not None else None,
        weight_noise(result, unit).decibels if weights is not None else None,
        float((weights.rounded(values) == 0).mean()) if weights is not None and values is not None else None,
        bits.activations if output is not None else None,
        low,
        high,
        output.signed if output is not None else None,
        output.step if output is not None else None,
        result.noise[unit.name].decibels if unit.name in result.noise and output is not None else None,
        alone - result.before.top1 if alone is not None and result.before is not None else None,
    )


def reach(grid: Grid) -> tuple[float, float]:
    """The least and the largest value of a grid of activations."""
    return (grid.low - grid.offset) * grid.step, (grid.high - grid.offset) * grid.step


def _energy(values: NDArray[np.float32]) -> float:
    return float(np.square(values, dtype=np.float64).sum())
