"""Passes through a quantized network on PyTorch: fake quantization.

Where weights and inputs are on grids, a convolution computes with their whole numbers, held as float32: sums
below 2^24 are exact, as a processor's are, and one factor for each channel makes values of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from caffe_jacinto.engines.pytorch.distributed import device_of_rank
from caffe_jacinto.engines.pytorch.engine import Options
from caffe_jacinto.engines.pytorch.net import TEST, Net
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.quantization.grids import Grid
from caffe_jacinto.quantization.network import Network, Quantization
from caffe_jacinto.quantization.units import INPUT, Unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.float32]

SAMPLE = 65_536
"""Values of a blob that are taken of each batch for its histogram."""


@dataclass(frozen=True)
class Carried:
    """A blob in a pass: its values, or numbers of a grid."""

    tensor: Tensor
    grid: Grid | None = None

    @property
    def values(self) -> Tensor:
        if self.grid is None:
            return self.tensor
        shifted = self.tensor - self.grid.offset if self.grid.offset else self.tensor
        return shifted * self.grid.step


@dataclass(frozen=True)
class Seen:
    """What one batch has shown of a blob."""

    unit: Unit
    low: float
    high: float
    sample: Values | None


class QuantizedNet:
    """A network, with passes in float32 and with any quantization of it."""

    def __init__(self, message: Any, network: Network, gpus: Sequence[int], where: str) -> None:
        """``message`` is a deploy network in stock Caffe's dialect.

        Raises:
            UserError: a layer that is not supported, or a GPU that cannot be used.
        """
        self.device = device_of_rank(gpus, Options())
        self.network = network
        net = Net(message, TEST, Dialect.BVLC, where=where, seed=0, device=self.device, fused=False)
        self._functions: dict[str, Callable[..., Any]] = {}
        self._bottoms: dict[str, tuple[str, ...]] = {}
        self._tops: dict[str, tuple[str, ...]] = {}
        for step in net.steps:
            (module,) = step.modules
            self._functions[step.name] = module.function
            self._bottoms[step.name], self._tops[step.name] = step.bottoms, step.tops
        self._blobs = {
            name: [self._on_device(blob) for blob in blobs] for name, blobs in network.blobs.items()
        }
        self._prepared: tuple[Quantization | None, dict[str, list[Tensor]]] = (None, self._blobs)
        self._done_with = _last_uses(network.units, self._bottoms, self._tops)

    def passing(
        self, images: Values | Tensor, quantization: Quantization | None
    ) -> Iterator[tuple[Unit, Carried]]:
        """One pass; each unit with its output.

        ``images`` are batch x channels x height x width.
        """
        blobs = self._blobs_for(quantization)
        taken = images if isinstance(images, Tensor) else self._on_device(images)
        values: dict[str, Carried] = {}
        for unit in self.network.units:
            is_input = unit.type == INPUT
            made = Carried(taken) if is_input else self._computed(unit, values, blobs, quantization)
            grid = quantization.outputs.get(unit.name) if quantization else None
            if grid is not None:
                made = Carried(_numbers(made.values, grid), grid)
            values[unit.blob] = made
            yield unit, made
            for name in self._done_with[unit.name]:
                values.pop(name, None)

    def scores(self, images: Values, quantization: Quantization | None) -> Values:
        """The network's output, images x classes."""
        with torch.inference_mode():
            for _, made in self.passing(images, quantization):
                last = made
            found: Values = last.values.cpu().numpy()
        return found.reshape(len(images), -1)

    def seen(self, images: Values, quantization: Quantization | None, *, sampled: bool) -> Iterator[Seen]:
        """The range of each output that is quantized, in one pass; ``sampled``: with some of its values."""
        with torch.inference_mode():
            for unit, made in self.passing(images, quantization):
                if unit.output == "quantized":
                    values = made.values
                    low, high = torch.stack(torch.aminmax(values)).tolist()
                    sample = _sample(values).cpu().numpy() if sampled else None
                    yield Seen(unit, low, high, sample)

    def signal_and_noise(
        self, images: Values, quantization: Quantization
    ) -> Iterator[tuple[Unit, float, float]]:
        """The energy of each quantized unit's output, and that of what quantization changes in it."""
        taken = self._on_device(images)
        with torch.inference_mode():
            both = zip(self.passing(taken, None), self.passing(taken, quantization), strict=True)
            for (unit, exact), (_, rounded) in both:
                if unit.output == "quantized":
                    noise = rounded.values - exact.values
                    yield unit, _energy(exact.values), _energy(noise)

    def mean_errors(self, images: Values, quantization: Quantization) -> Iterator[tuple[Unit, Values]]:
        """What quantizing the weights of each unit alone adds to its output channels, on average."""
        taken = self._on_device(images)
        differences = {
            name: torch.from_numpy(grid.rounded(self.network.blobs[name][0])).to(self.device)
            - self._blobs[name][0]
            for name, grid in quantization.weights.items()
        }
        inputs: dict[str, Tensor] = {}
        with torch.inference_mode():
            for unit, made in self.passing(taken, None):
                if unit.name in differences:
                    blobs = [
                        differences[unit.name],
                        *(torch.zeros_like(b) for b in self._blobs[unit.name][1:]),
                    ]
                    change = self._functions[unit.name](blobs, inputs[self._bottoms[unit.name][0]])
                    axes = [axis for axis in range(change.dim()) if axis != 1]
                    yield unit, change.mean(axes).cpu().numpy()
                inputs[unit.blob] = made.values
                for name in self._done_with[unit.name]:
                    inputs.pop(name, None)

    def _computed(
        self,
        unit: Unit,
        values: dict[str, Carried],
        blobs: Mapping[str, list[Tensor]],
        quantization: Quantization | None,
    ) -> Carried:
        """The unit's output before it is quantized."""
        first, *others = unit.layers
        given = [values[name] for name in self._bottoms[first]]
        if unit.output == "kept" and not others:
            made = self._functions[first](blobs.get(first, []), *(carried.tensor for carried in given))
            tops = made if isinstance(made, tuple) else (made,)
            for name, top in zip(self._tops[first], tops, strict=True):
                values[name] = Carried(top, given[0].grid)
            return values[unit.blob]
        if quantization is not None and quantization.in_whole_numbers(unit.name):
            sums = self._functions[first](blobs[first], given[0].tensor)
            result = sums * self._along_channels(quantization.factor(unit.name), sums)
        else:
            result = self._functions[first](blobs.get(first, []), *(carried.values for carried in given))
        for name in others:
            result = self._functions[name](blobs.get(name, []), result)
        return Carried(result)

    def _along_channels(self, factors: NDArray[np.float64], sums: Tensor) -> Tensor:
        shape = (-1, *[1] * (sums.dim() - 2)) if factors.size > 1 else ()
        return torch.from_numpy(factors.astype(np.float32)).to(self.device).reshape(shape)

    def _blobs_for(self, quantization: Quantization | None) -> Mapping[str, list[Tensor]]:
        """Each layer's blobs as ``quantization`` has them; kept until another one is asked for."""
        if quantization is None:
            return self._blobs
        if self._prepared[0] is not quantization:
            made = dict(self._blobs)
            for name, grid in quantization.weights.items():
                made[name] = [
                    self._on_device(blob) for blob in quantized_blobs(self.network, quantization, name, grid)
                ]
            self._prepared = (quantization, made)
        return self._prepared[1]

    def _on_device(self, values: Values) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values)).to(self.device)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def quantized_blobs(network: Network, quantization: Quantization, name: str, grid: Grid) -> list[Values]:
    """The weights and bias that a weighted unit computes with: whole numbers, or the values of the grids."""
    weights, *bias = network.blobs[name]
    if name in quantization.corrected:
        bias = [quantization.corrected[name]]
    if quantization.in_whole_numbers(name):
        return [grid.numbers(weights), *(quantization.bias_numbers(name, b).astype(np.float32) for b in bias)]
    biases = quantization.biases.get(name)
    return [grid.rounded(weights), *(biases.rounded(b) if biases else b for b in bias)]


def _numbers(values: Tensor, grid: Grid) -> Tensor:
    """As `Grid.numbers`."""
    scaled = values / grid.step
    if grid.offset:
        scaled += grid.offset
    return scaled.round_().clamp_(grid.low, grid.high)


def _sample(values: Tensor) -> Tensor:
    """At most about `SAMPLE` of the values, evenly spaced in memory."""
    # In the order of memory, which for images is channels last.
    flat = (values.permute(0, 2, 3, 1) if values.dim() == 4 else values).reshape(-1)
    # An odd distance meets every channel.
    return flat[:: (flat.numel() // SAMPLE) | 1]


def _energy(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


def _last_uses(
    units: Sequence[Unit], bottoms: Mapping[str, Sequence[str]], tops: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """By unit, the blobs that no later unit reads."""
    found: dict[str, list[str]] = {}
    needed: set[str] = set()
    for unit in reversed(units):
        touched = {unit.blob}
        for layer in unit.layers:
            touched.update(bottoms[layer], tops[layer])
        found[unit.name] = sorted(touched - needed)
        needed |= touched
    return found
