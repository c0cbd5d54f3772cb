"""A network's quantization: the grids of every unit's weights, bias and output.

This is all that a processor needs beside the weights; `engines/pytorch/quantized.py` computes with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.netspec.layer_types import role_of
from caffe_jacinto.quantization.grids import (
    Grid,
    activation_grid,
    is_range,
    magnitude_grid,
    offset_grid,
    weight_grid,
)
from caffe_jacinto.quantization.ranges import Range
from caffe_jacinto.quantization.schemes import Bits, Scheme
from caffe_jacinto.quantization.units import INPUT, WEIGHTED, Unit, unit_named, units_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.float32]
    Blobs = Mapping[str, Sequence[Values]]
    """The blobs of each layer by its name."""

    Biases = Mapping[str, Values | None]


@dataclass(frozen=True)
class Network:
    """What is quantized: a network's units and blobs, by a scheme."""

    scheme: Scheme
    units: Sequence[Unit]
    blobs: Blobs
    bottoms: Mapping[str, Sequence[str]]
    """The blobs that each layer reads."""

    channel_axes: Mapping[str, int | None]
    """The axis of the output channels in each weighted layer's weights; None: they have none of their own."""

    bits: Mapping[str, Bits] = field(default_factory=dict)
    """Of the units that have others than the scheme's."""

    floats: Collection[str] = ()
    """Units that stay as they are."""

    def bits_of(self, unit: Unit) -> Bits:
        return self.bits.get(unit.name, self.scheme.bits)

    def weights(self, unit: Unit) -> Values:
        return self.blobs[unit.name][0]

    def axis_of_steps(self, unit: Unit) -> int | None:
        """The axis of its weights' channels that have a step each; None: all have one."""
        return self.channel_axes[unit.name] if self.scheme.by_channel else None

    def bias(self, unit: Unit) -> Values | None:
        blobs = self.blobs[unit.name]
        return blobs[1] if len(blobs) > 1 else None


@dataclass(frozen=True)
class Quantization:
    """The grids of a network, by the name of the unit; those that are missing stay as they are."""

    outputs: Mapping[str, Grid]
    inputs: Mapping[str, Grid]
    """That of a weighted unit's input, where it is on one."""

    weights: Mapping[str, Grid]
    biases: Mapping[str, Grid]
    corrected: Mapping[str, Values] = field(default_factory=dict)
    """Biases that take the place of the network's, by bias correction."""

    def only(self, unit: str) -> Quantization:
        """Quantizing one unit alone."""

        def one(grids: Mapping[str, Grid]) -> dict[str, Grid]:
            return {name: grid for name, grid in grids.items() if name == unit}

        corrected = {name: bias for name, bias in self.corrected.items() if name == unit}
        return Quantization(one(self.outputs), {}, one(self.weights), {}, corrected)

    def factor(self, unit: str) -> NDArray[np.float64]:
        """What one unit of a weighted unit's sums of whole numbers stands for: one, or one per channel.

        Only where it reads numbers of a grid.
        """
        steps: NDArray[np.float64] = self.weights[unit].steps.astype(np.float64) * self.inputs[unit].step
        return steps

    def in_whole_numbers(self, unit: str) -> bool:
        """Whether a weighted unit computes with whole numbers alone."""
        found = self.weights.get(unit), self.inputs.get(unit)
        return all(grid is not None and grid.offset == 0 for grid in found)

    def bias_numbers(self, unit: str, bias: Values) -> NDArray[np.float64]:
        """A bias in the units of the sums."""
        numbers: NDArray[np.float64] = np.rint(
            self.biases[unit].rounded(bias).astype(np.float64) / self.factor(unit)
        )
        return numbers


def network_of(
    scheme: Scheme,
    layers: Sequence[Any],
    blobs: Blobs,
    where: str,
    *,
    bits: Mapping[str, int] | None = None,
    floats: Sequence[str] = (),
    called: tuple[str, str] = ("--bits-of", "--keep-float"),
    exactly: bool = False,
) -> Network:
    """The network of ``layers``, LayerParameter messages of one phase.

    Args:
        bits: layers with another number of bits for weights and outputs than the scheme's.
        floats: layers that stay as they are, with those that are computed together with them.
        called: the options that ``bits`` and ``floats`` come from, for messages.
        exactly: only ``floats`` themselves stay, as the fork's `ignored_layer_names`.
        where: the network's file, for messages.

    Raises:
        UserError: a layer that the scheme does not know, or one in ``bits`` or ``floats`` that is not
            there; bits that are out of range; weights that are not finite.
    """
    scheme.bits.checked("--bits: ")
    for name, found in blobs.items():
        if not all(np.isfinite(blob).all() for blob in found):
            raise UserError(f"{where}: layer {name} has weights that are not finite; use an earlier snapshot")
    read = {layer.name: tuple(layer.bottom) for layer in layers}
    units = _all_units(scheme, layers, where)
    own = _names_of_inputs(layers)
    given = {}
    for name, number in (bits or {}).items():
        unit = unit_named(units, own.get(name, name), called[0])
        changed = replace(scheme.bits, weights=number, activations=number)
        given[unit.name] = changed.checked(f"{called[0]} {name}={number}: ")
    kept: set[str] = set()
    for name in floats:
        unit = unit_named(units, own.get(name, name), called[1])
        if unit.name in given:
            raise UserError(f"{called[1]} {name}: {called[0]} gives it bits; leave one of them out")
        kept.update((own.get(name, name),) if exactly else (unit.name, *unit.layers))
    axes = {layer.name: _channel_axis(layer) for layer in layers if layer.type in WEIGHTED}
    return Network(scheme, units, blobs, read, axes, given, kept)


def computed_together(scheme: Scheme, layers: Sequence[Any], names: Sequence[str], where: str) -> list[str]:
    """Of ``layers``, LayerParameter messages of one phase, ``names`` and those computed together with them.

    Raises:
        UserError: a name is not there, or the scheme does not know a layer; ``where`` names the network.
    """
    units, own = _all_units(scheme, layers, where), _names_of_inputs(layers)
    found = {unit_named(units, own.get(name, name), f"{where}: layer") for name in names}
    blobs = {unit.blob for unit in found if unit.type == INPUT}
    together = {name for unit in found for name in unit.layers}
    return [layer.name for layer in layers if layer.name in together or own.get(layer.name) in blobs]


def _all_units(scheme: Scheme, layers: Sequence[Any], where: str) -> list[Unit]:
    """The units of a network, with those of its inputs."""
    given_tops = [(layer.type, list(layer.top)) for layer in layers if role_of(layer.type) == "data"]
    inputs = [top for kind, tops in given_tops for top in (tops if kind == INPUT else tops[:1])]
    labels = [top for kind, tops in given_tops for top in tops[1:] if kind != INPUT]
    written = {top for layer in layers for top in layer.top}
    inputs += [name for layer in layers for name in layer.bottom if name not in written]
    fork = scheme.moving is not None
    return units_of(layers, list(dict.fromkeys(inputs)), labels, fork=fork, where=where)


def _names_of_inputs(layers: Sequence[Any]) -> dict[str, str]:
    """The blob that the unit of an input is named by, by the name of its layer."""
    return {layer.name: layer.top[0] for layer in layers if role_of(layer.type) == "data" and layer.top}


def rounded_blobs(network: Network, quantization: Quantization, name: str) -> list[Values]:
    """The blobs of a quantized layer with weights, with the values that their numbers stand for."""
    weights, *bias = network.blobs[name]
    bias = [quantization.corrected.get(name, values) for values in bias]
    grid = quantization.biases.get(name)
    return [quantization.weights[name].rounded(weights), *(grid.rounded(b) if grid else b for b in bias)]


def _channel_axis(layer: Any) -> int | None:
    """The axis of a weight blob along which its outputs are, which are also axis 1 of what it computes."""
    if layer.type == "InnerProduct":
        if layer.inner_product_param.axis != 1:
            return None
        return 1 if layer.inner_product_param.transpose else 0
    if layer.convolution_param.axis != 1:
        return None
    if layer.type == "Deconvolution":
        return 1 if layer.convolution_param.group == 1 else None
    return 0


def quantization_of(
    network: Network, ranges: Mapping[str, Range], where: str, before: Quantization | None = None
) -> Quantization:
    """The grids of ``network``.

    Args:
        ranges: what the calibration has seen, by unit.
        where: the network's file, for messages.
        before: a quantization of the same network by other ranges, whose weights stay.

    Raises:
        UserError: a range is not finite.
    """
    outputs = {
        unit.name: output_grid(network, unit, ranges[unit.name], where) for unit in quantized_outputs(network)
    }
    if before is not None and network.scheme.moving is not None:
        return replace(before, outputs=outputs)
    weights = {
        unit.name: grid_of_weights(network, unit, network.weights(unit))
        for unit in quantized_weights(network)
    }
    return with_grids(network, outputs, weights)


def quantized_outputs(network: Network) -> list[Unit]:
    """The units whose output is quantized."""
    return [
        unit
        for unit in network.units
        if unit.output == "quantized" and (unit.layers or (unit.name,))[-1] not in network.floats
    ]


def quantized_weights(network: Network) -> list[Unit]:
    """The units whose weights are quantized."""
    return [unit for unit in network.units if unit.weighted and unit.name not in network.floats]


def with_grids(
    network: Network, outputs: Mapping[str, Grid], weights: Mapping[str, Grid], biases: Biases | None = None
) -> Quantization:
    """The quantization with these grids of outputs and weights; those of inputs and biases follow from them.

    Steps of weights that are too small for the bias to fit into the sums are larger in it.

    Args:
        biases: that take the place of the network's; None in it: the unit has none.
    """
    weights = dict(weights)
    found = Quantization(outputs, _inputs(network, outputs), weights, {})
    grids = {}
    for unit in network.units:
        if unit.name not in weights:
            continue
        bias = network.bias(unit) if biases is None else biases[unit.name]
        if bias is None:
            continue
        if found.in_whole_numbers(unit.name):
            weights[unit.name] = _with_room_for(
                bias, weights[unit.name], found.inputs[unit.name], power_of_two=network.scheme.power_of_two
            )
        grid = _bias_grid(network, found, unit, bias)
        if grid is not None:
            grids[unit.name] = grid
    return replace(found, biases=grids)


def output_grid(network: Network, unit: Unit, seen: Range, where: str) -> Grid:
    """The grid of a unit's output."""
    scheme, bits = network.scheme, network.bits_of(unit).activations
    if not is_range(seen.low, seen.high):
        raise UserError(
            f"{where}: layer {unit.name} ({unit.type}) gives values from {seen.low:g} to {seen.high:g} on "
            "the calibration images, which is not a range; check its weights and the images' preprocessing"
        )
    if scheme.moving is not None:
        grid = offset_grid if scheme.moving.offset_activations else magnitude_grid
        return grid(seen.low, seen.high, bits, power_of_two=scheme.power_of_two)
    low, high = seen.chosen(
        scheme.activation_ranges, scheme.percentile, bits, power_of_two=scheme.power_of_two
    )
    return activation_grid(low, high, bits, power_of_two=scheme.power_of_two)


def _inputs(network: Network, outputs: Mapping[str, Grid]) -> dict[str, Grid]:
    """The grid that each weighted unit's input is on.

    The fork computes with values, not with whole numbers: its weights have offsets.
    """
    if network.scheme.moving is not None:
        return {}
    current: dict[str, Grid | None] = {}
    found = {}
    for unit in network.units:
        bottoms = network.bottoms[unit.layers[0]] if unit.layers else ()
        given = current.get(bottoms[0]) if bottoms else None
        if unit.weighted and given is not None and unit.name not in network.floats:
            found[unit.name] = given
        current[unit.blob] = given if unit.output == "kept" else outputs.get(unit.name)
    return found


def grid_of_weights(network: Network, unit: Unit, weights: Values) -> Grid:
    """The grid of ``weights``, the unit's own or those that it has at a moment of its training."""
    scheme, bits = network.scheme, network.bits_of(unit).weights
    if scheme.moving is not None:
        grid = offset_grid if scheme.offset_weights else magnitude_grid
        return grid(float(weights.min()), float(weights.max()), bits, power_of_two=scheme.power_of_two)
    return weight_grid(
        weights,
        bits,
        axis=network.axis_of_steps(unit),
        power_of_two=scheme.power_of_two,
        squared_error=scheme.weight_ranges == "mse",
        percentile=scheme.percentile if scheme.weight_ranges == "percentile" else 100.0,
    )


_ROOM = 2.0**30
"""The largest bias in units of sums of 32 bits: products have as much room again."""


def _with_room_for(bias: Values, weights: Grid, given: Grid, *, power_of_two: bool) -> Grid:
    """The grid of ``weights`` with steps for which ``bias`` fits into the sums; ``given``: that of the input.

    A channel whose weights have almost vanished, but not its bias, would have sums beyond those of a
    processor: of 32 bits for 8-bit numbers, and as many more as the numbers have.
    """
    more = max(0, weights.bits + given.bits - 16)
    needed = np.abs(bias.astype(np.float64)) / (_ROOM * 2.0**more * given.step)
    return weights.with_steps_from(needed if weights.steps.size > 1 else needed.max(), power_of_two)


def _bias_grid(network: Network, found: Quantization, unit: Unit, bias: Values) -> Grid | None:
    """The grid of a bias: that of the sums, coarser by a power of two where its bits do not reach far enough.

    Each channel whose weights have a step of its own is coarser by its own bias, not by the largest.

    None where the input is on no grid, so that the sums are on none.
    """
    bits = network.bits_of(unit).bias
    if network.scheme.moving is not None:
        power = network.scheme.power_of_two
        return magnitude_grid(float(bias.min()), float(bias.max()), bits, clipped=False, power_of_two=power)
    if not found.in_whole_numbers(unit.name):
        return None
    most = 2 ** (bits - 1) - 1
    steps = found.factor(unit.name)
    excess = np.abs(bias) / steps / most
    largest = excess if steps.size > 1 else excess.max()
    shift = np.ceil(np.log2(np.maximum(largest, 1)))
    return Grid((steps * 2.0**shift).astype(np.float32), -most, most)
