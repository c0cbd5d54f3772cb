"""What an engine gives that computes a quantized network, in float32 and by any quantization of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from caffe_jacinto.quantization.network import Quantization
from caffe_jacinto.quantization.units import Unit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]

SAMPLE = 65_536
"""About as many values of a blob are taken of each batch for its histogram: at most twice as many."""


@dataclass(frozen=True)
class Seen:
    """What one batch has shown of a blob."""

    unit: Unit
    low: float
    high: float
    sample: Values | None


class Passes(Protocol):
    """A network on an engine; images are batch x channels x height x width."""

    def scores(self, images: Values, quantization: Quantization | None) -> Values:
        """The network's output, images x classes."""
        ...

    def seen(self, images: Values, quantization: Quantization | None, *, sampled: bool) -> Iterator[Seen]:
        """The range of each output that is quantized, in one pass; ``sampled``: with some of its values."""
        ...

    def signal_and_noise(
        self, images: Values, quantization: Quantization
    ) -> Iterator[tuple[Unit, float, float]]:
        """The energy of each quantized unit's output, and that of what quantization changes in it."""
        ...

    def mean_errors(self, images: Values, quantization: Quantization) -> Iterator[tuple[Unit, Values]]:
        """What quantizing the weights of each unit alone adds to its output channels, on average."""
        ...


def sample_step(count: int) -> int:
    """Of ``count`` values, every how many go into a histogram; odd, so that it meets every channel."""
    return (count // SAMPLE) | 1


def seen_values(unit: Unit, values: Values, *, sampled: bool) -> Seen:
    """What ``values``, a unit's output, show."""
    flat = values.reshape(-1)
    sample = flat[:: sample_step(flat.size)].copy() if sampled else None
    return Seen(unit, float(values.min()), float(values.max()), sample)
