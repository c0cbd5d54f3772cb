"""Passes through a quantized network on PyTorch: fake quantization.

Where weights and inputs are on grids, a convolution computes with their whole numbers, held as float32: sums
below 2^24 are exact (`_sums`), as a processor's are. One factor for each channel, (input step x weight step)
/ output step in float32, brings them to the grid of the output, as in onnxruntime's QLinearConv and QGemm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from caffe_jacinto.engines.pytorch.distributed import device_of_rank
from caffe_jacinto.engines.pytorch.engine import Options
from caffe_jacinto.engines.pytorch.net import TEST, Net
from caffe_jacinto.engines.pytorch.rounding import rounded, stands_for
from caffe_jacinto.engines.pytorch.snapshot import array
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.quantization.fork_settings import ForkSettings
from caffe_jacinto.quantization.grids import Grid
from caffe_jacinto.quantization.network import (
    Network,
    Quantization,
    quantization_of,
    rounded_blobs,
)
from caffe_jacinto.quantization.passes import Seen, sample_step
from caffe_jacinto.quantization.ranges import Histogram, Range
from caffe_jacinto.quantization.schemes import MovingRange
from caffe_jacinto.quantization.units import INPUT, Unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.float32]

_ONE = np.ones(1, np.float32)


@dataclass(frozen=True)
class Carried:
    """A blob in a pass: its values, numbers of a grid, or what a layer makes of numbers."""

    tensor: Tensor
    grid: Grid | None = None
    factors: Values | None = None
    """What 1 of a layer's sums of numbers stands for: one, or one for each channel."""

    @property
    def values(self) -> Tensor:
        if self.factors is not None:
            return self.tensor * along_channels(self.factors, self.tensor)
        if self.grid is None:
            return self.tensor
        shifted = self.tensor - self.grid.offset if self.grid.offset else self.tensor
        return shifted * self.grid.step

    def rounded(self, grid: Grid) -> Carried:
        """Its values as numbers of ``grid``."""
        if self.factors is None:
            return Carried(rounded(self.values, grid), grid)
        # A multiplication alone, as processors do: with a division after it, other values would be rounded
        # to the other side, and the layers behind add to that.
        factors = self.factors / np.float32(grid.step)
        scaled = self.tensor * along_channels(factors, self.tensor)
        return Carried(rounded(scaled, replace(grid, steps=_ONE)), grid)


@dataclass(frozen=True)
class Computed:
    """What a pass computes with, by layer."""

    blobs: Mapping[str, Sequence[Tensor]]
    """As `quantized_blobs` for what is quantized."""

    functions: Mapping[str, Callable[..., Any]]
    after: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """Applied to what a weighted layer gives, before the others of its unit."""

    see: Callable[[Unit, Tensor], None] | None = None
    """Shown the output of each quantized unit before it is rounded."""


class QuantizedNet:
    """A network, with passes in float32 and with any quantization of it."""

    def __init__(self, net: Net, network: Network) -> None:
        """``net`` has a step for each layer (not ``fused``); its weights are those of ``network``."""
        self.device = net.device
        self.network = network
        self.outputs = set(net.output_names)
        """The blobs that a pass gives by name."""

        self.functions: dict[str, Callable[..., Any]] = {}
        """What each layer computes from its blobs and bottoms."""

        self._types = {layer.name: layer.type for layer in net.layers}
        self._bottoms: dict[str, tuple[str, ...]] = {}
        self._tops: dict[str, tuple[str, ...]] = {}
        for step in net.steps:
            (module,) = step.modules
            self.functions[step.name] = module.function
            self._bottoms[step.name], self._tops[step.name] = step.bottoms, step.tops
        self._blobs = {
            name: [self._on_device(blob) for blob in blobs] for name, blobs in network.blobs.items()
        }
        self._prepared: tuple[Quantization | None, dict[str, list[Tensor]]] = (None, self._blobs)
        self._done_with = _last_uses(network.units, self._bottoms, self._tops)

    def passing(
        self,
        images: Values | Tensor | Mapping[str, Tensor],
        quantization: Quantization | None,
        outputs: dict[str, Tensor] | None = None,
        computed: Computed | None = None,
    ) -> Iterator[tuple[Unit, Carried]]:
        """One pass; each unit with its output.

        Args:
            images: batch x channels x height x width; or all inputs by name.
            outputs: takes the `outputs` by name.
            computed: with other blobs and functions than the network's own.
        """
        computed = computed or Computed(self._blobs_for(quantization), self.functions)
        if not isinstance(images, Mapping):
            images = dict.fromkeys([self.network.units[0].blob], self._on_device(images))
        values: dict[str, Carried] = {}
        for unit in self.network.units:
            is_input = unit.type == INPUT
            made = (
                Carried(images[unit.blob]) if is_input else self._output(unit, values, computed, quantization)
            )
            if computed.see is not None and unit.output == "quantized":
                computed.see(unit, made.values)
            grid = quantization.outputs.get(unit.name) if quantization else None
            if grid is not None:
                made = made.rounded(grid)
            elif made.factors is not None:
                made = Carried(made.values)
            values[unit.blob] = made
            yield unit, made
            for name in self._done_with[unit.name]:
                done = values.pop(name, None)
                if outputs is not None and done is not None and name in self.outputs:
                    outputs[name] = done.values

    def scores(self, images: Values, quantization: Quantization | None) -> Values:
        """The network's output, images x classes."""
        with self._inference():
            for _, made in self.passing(images, quantization):
                last = made
            found: Values = last.values.cpu().numpy()
        return found.reshape(len(images), -1)

    def seen(self, images: Values, quantization: Quantization | None, *, sampled: bool) -> Iterator[Seen]:
        """The range of each output that is quantized, in one pass; ``sampled``: with some of its values."""
        with self._inference():
            for unit, made in self.passing(images, quantization):
                if unit.output == "quantized":
                    yield seen_of(unit, made.values, sampled=sampled)

    def signal_and_noise(
        self, images: Values, quantization: Quantization
    ) -> Iterator[tuple[Unit, float, float]]:
        """The energy of each quantized unit's output, and that of what quantization changes in it."""
        taken = self._on_device(images)
        with self._inference():
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
        with self._inference():
            for unit, made in self.passing(taken, None):
                if unit.name in differences:
                    blobs = [
                        differences[unit.name],
                        *(torch.zeros_like(b) for b in self._blobs[unit.name][1:]),
                    ]
                    change = self.functions[unit.name](blobs, inputs[self._bottoms[unit.name][0]])
                    axes = [axis for axis in range(change.dim()) if axis != 1]
                    yield unit, change.mean(axes).cpu().numpy()
                inputs[unit.blob] = made.values
                for name in self._done_with[unit.name]:
                    inputs.pop(name, None)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Passes without gradients; in a thread of its own, too, on this network's device."""
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on_device, torch.inference_mode():
            yield

    def _output(
        self,
        unit: Unit,
        values: dict[str, Carried],
        computed: Computed,
        quantization: Quantization | None,
    ) -> Carried:
        """The unit's output before it is quantized."""
        blobs, functions = computed.blobs, computed.functions
        first, *others = unit.layers
        given = [values[name] for name in self._bottoms[first]]
        if unit.output == "kept" and not others:
            made = functions[first](blobs.get(first, []), *(carried.tensor for carried in given))
            tops = made if isinstance(made, tuple) else (made,)
            for name, top in zip(self._tops[first], tops, strict=True):
                values[name] = Carried(top, given[0].grid)
            return values[unit.blob]
        factors = self._factors(unit, given[0].grid, quantization)
        if factors is not None:
            sums = _sums(functions[first], blobs.get(first, []), given[0].tensor)
            made = Carried(sums, factors=factors)
            if first not in computed.after and all(self._types[name] == "ReLU" for name in others):
                numbers = made.tensor
                for name in others:
                    numbers = functions[name]([], numbers)
                return Carried(numbers, factors=factors)
            result: Any = made.values
        else:
            result = functions[first](blobs.get(first, []), *(carried.values for carried in given))
        if isinstance(result, tuple):  # a layer of several tops, which runs alone
            values.update(zip(self._tops[first], map(Carried, result), strict=True))
            return values[unit.blob]
        if first in computed.after:
            result = computed.after[first](result)
        for name in others:
            result = functions[name](blobs.get(name, []), result)
        return Carried(result)

    def _factors(self, unit: Unit, given: Grid | None, quantization: Quantization | None) -> Values | None:
        """What 1 of the unit's first layer's results stands for; None where it computes with values.

        ``given``: the grid of its input.
        """
        if quantization is None:
            return None
        if quantization.in_whole_numbers(unit.name):
            return quantization.factor(unit.name).astype(np.float32)
        # The mean of numbers is that of their values, over the step. The fork takes that of the values.
        averages = unit.type == "Pooling" and self.network.scheme.moving is None
        return given.steps if averages and given is not None else None

    def _blobs_for(self, quantization: Quantization | None) -> Mapping[str, list[Tensor]]:
        """Each layer's blobs as ``quantization`` has them; kept until another one is asked for."""
        if quantization is None:
            return self._blobs
        before = self._prepared[0]
        if before is None or not _same_weights(before, quantization):
            made = dict(self._blobs)
            for name, grid in quantization.weights.items():
                made[name] = [
                    self._on_device(blob) for blob in quantized_blobs(self.network, quantization, name, grid)
                ]
            self._prepared = (quantization, made)
        return self._prepared[1]

    def _on_device(self, values: Values | Tensor) -> Tensor:
        if isinstance(values, Tensor):
            return values
        tensor = torch.from_numpy(np.ascontiguousarray(values)).to(self.device)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _sums(function: Callable[..., Any], blobs: Sequence[Tensor], numbers: Tensor) -> Tensor:
    """What a layer makes of whole ``numbers``, and of whole numbers as its weights: exact sums.

    A CPU's kernels sum up products in float32, in some order, which is exact. cuDNN's need not: Winograd's
    and the FFT's algorithms compute with fractions, are among those that it may choose without measuring and
    where results have to be deterministic, and cannot be switched off alone. For float64 it has neither of
    them, nor TF32, and any order of sums is exact. Gradients need not be: they are computed in float32.
    """
    if not blobs or not _may_round(numbers):
        result: Tensor = function(blobs, numbers)
        return result
    with torch.no_grad():
        sums: Tensor = function([blob.double() for blob in blobs], numbers.double()).float()
    if not torch.is_grad_enabled():
        return sums
    return stands_for(function(blobs, numbers), sums, sums.new_ones(()))


def _may_round(numbers: Tensor) -> bool:
    """Whether sums of products of whole numbers may be rounded where these are."""
    return numbers.is_cuda


def along_channels(factors: Values, values: Tensor) -> Tensor:
    """One number, or one for each channel, in a shape that broadcasts over ``values``."""
    shape = (-1, *[1] * (values.dim() - 2)) if factors.size > 1 else ()
    return torch.from_numpy(factors).to(values.device, non_blocking=True).reshape(shape)


def quantized_blobs(network: Network, quantization: Quantization, name: str, grid: Grid) -> list[Values]:
    """The weights and bias that a weighted unit computes with: whole numbers, or the values of the grids."""
    if not quantization.in_whole_numbers(name):
        return rounded_blobs(network, quantization, name)
    weights, *bias = network.blobs[name]
    bias = [quantization.corrected.get(name, values) for values in bias]
    return [grid.numbers(weights), *(quantization.bias_numbers(name, b).astype(np.float32) for b in bias)]


def quantized_net(message: Any, network: Network, gpus: Sequence[int], where: str) -> QuantizedNet:
    """The passes of ``message``, a deploy network in stock Caffe's dialect.

    Raises:
        UserError: a layer that is not supported, or a GPU that cannot be used.
    """
    device = device_of_rank(gpus, Options())
    net = Net(message, TEST, Dialect.BVLC, where=where, seed=0, device=device, fused=False)
    return QuantizedNet(net, network)


def moving_passes(
    net: Net, settings: ForkSettings, where: str, before: MovingPasses | None = None
) -> MovingPasses:
    """The passes of a test network in caffe-jacinto's dialect, by its own settings and with its weights.

    ``before``: passes of the same network with earlier weights, whose ranges go on.

    Raises:
        UserError: an ignored layer that is not there, or weights that are not finite.
    """
    moving = settings.scheme.moving
    assert moving is not None
    blobs = {name: [array(blob.tensor) for blob in found] for name, found in net.layer_blobs.items()}
    network = settings.network(net.layers, blobs, where)
    passes = MovingPasses(
        QuantizedNet(net, network),
        moving,
        where,
        weights=settings.weights,
        activations=settings.activations,
    )
    if before is not None:
        passes.continue_from(before)
    return passes


class MovingPasses:
    """Passes whose ranges move with what they show, as the fork's do."""

    def __init__(
        self,
        net: QuantizedNet,
        moving: MovingRange,
        where: str,
        *,
        sampled: bool = False,
        weights: bool = True,
        activations: bool = True,
    ) -> None:
        """
        Args:
            where: the network's file, for messages.
            sampled: fill histograms, too.
            weights: quantize them.
            activations: quantize them.
        """
        self._weights, self._activations = weights, activations
        self._net, self._moving, self._where, self._sampled = net, moving, where, sampled
        self._passes = 0
        self._quantization: Quantization | None = None
        self.ranges = {
            unit.name: Range(histogram=Histogram() if sampled else None)
            for unit in net.network.units
            if unit.output == "quantized"
        }
        """By unit."""

    def continue_from(self, before: MovingPasses) -> None:
        """Take over the ranges of ``before``, and the number of passes."""
        self.ranges, self._passes = before.ranges, before._passes

    def run(self, inputs: Values | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One pass; the network's outputs by name.

        Raises:
            UserError: a range is not finite.
        """
        if self._passes >= self._moving.start and self._passes:
            found = quantization_of(self._net.network, self.ranges, self._where, self._quantization)
            if not self._activations:
                found = replace(found, outputs={})
            if not self._weights and self._quantization is None:
                found = replace(found, weights={}, biases={})
            self._quantization = found
        outputs: dict[str, Tensor] = {}
        last: dict[str, Seen] = {}
        with torch.inference_mode():
            for unit, made in self._net.passing(inputs, self._quantization, outputs):
                if unit.output != "quantized":
                    # Written in place after another unit: what the blob holds at the end counts.
                    if unit.blob in last:
                        last[unit.blob] = seen_of(unit, made.values, sampled=False)
                    continue
                seen = last[unit.blob] = seen_of(unit, made.values, sampled=self._sampled)
                histogram = self.ranges[unit.name].histogram
                if histogram is not None and seen.sample is not None:
                    histogram.add(seen.sample)
        for unit in self._net.network.units:
            if unit.name in self.ranges:
                self.ranges[unit.name].moved(last[unit.blob].low, last[unit.blob].high, self._moving)
        self._passes += 1
        return outputs


def seen_of(unit: Unit, values: Tensor, *, sampled: bool) -> Seen:
    """What ``values``, a unit's output, show; ``sampled``: with some of them."""
    # In the order of memory, channels last: in another one, PyTorch copies all of it first.
    flat = (values.permute(0, 2, 3, 1) if values.dim() == 4 else values).reshape(-1)
    low, high = torch.stack(torch.aminmax(flat)).tolist()
    return Seen(unit, low, high, flat[:: sample_step(flat.numel())].cpu().numpy() if sampled else None)


def _same_weights(one: Quantization, other: Quantization) -> bool:
    return one.weights is other.weights and one.biases is other.biases and one.corrected is other.corrected


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
