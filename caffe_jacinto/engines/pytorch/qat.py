"""Quantization-aware training: passes of a net in training whose values are rounded as they will be.

What leads to the prediction is computed as `quantized.py` does for a finished network: batch norms folded
into the weights of the moment, weights and activations on the grids of the scheme. The rest of the net
(losses, auxiliary classifiers) is computed in float32 from that. Gradients pass straight through the
rounding (`rounding.py`) to the weights as they were before folding, which are ordinary float weights.

While batch norms still learn their statistics, the folded sums are divided by the gain of the running
statistics again and normalized by those of the batch (Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2):
the weights are rounded as in the end, and the statistics are those of rounded values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from caffe_jacinto.caffemodel.batch_norm import lacks_statistics, require_statistics
from caffe_jacinto.engines.pytorch.folding import Folded, Folding
from caffe_jacinto.engines.pytorch.net import FED, TEST, Net, NetResult
from caffe_jacinto.engines.pytorch.quantized import Computed, QuantizedNet, seen_of
from caffe_jacinto.engines.pytorch.rounding import rounded, stands_for, steps_over
from caffe_jacinto.engines.pytorch.snapshot import array
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.quantization.fork_settings import fields_of
from caffe_jacinto.quantization.grids import Grid, symmetric_grid
from caffe_jacinto.quantization.network import (
    Network,
    Quantization,
    grid_of_weights,
    network_of,
    quantized_weights,
    with_grids,
)
from caffe_jacinto.quantization.schemes import Scheme
from caffe_jacinto.quantization.settling import SettlingRanges
from caffe_jacinto.quantization.trained_part import check_tested, trained_part
from caffe_jacinto.quantization.units import INPUT, WEIGHTED, Unit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from caffe_jacinto.engines.pytorch.distributed import Ranks


class QuantizedTraining(nn.Module):
    """A net in training, in quantized values."""

    def __init__(
        self,
        net: Net,
        scheme: Scheme,
        ranks: Ranks,
        *,
        bits: Mapping[str, int],
        floats: Sequence[str],
        settle: int,
        freeze: int,
    ) -> None:
        """``net`` is of the train phase, with a step for each layer.

        Args:
            bits: layers with another number of bits than the scheme's.
            floats: layers that stay as they are.
            settle: the iteration from which on ranges stay.
            freeze: the iteration from which on the statistics of batch norms stay.

        Raises:
            UserError: there is not one prediction, a layer that the scheme does not know, or one in ``bits``
                or ``floats`` that is not there.
        """
        super().__init__()
        self.net = net
        self.settle_from, self.freeze_from = settle, freeze
        self._ranks, self._frozen = ranks, False
        self._folding = Folding(net, layers_to_prediction(net), net.where)
        merged = self._folding.merged
        self.network = network_of(
            scheme,
            [layer.message for layer in merged.layers],
            {layer.name: layer.blobs for layer in merged.layers},
            net.where,
            bits=bits,
            floats=floats,
            called=("-quantize_bits_of", "-quantize_keep_float"),
        )
        whole: Any = type(merged.message)()
        whole.CopyFrom(merged.message)
        whole.layer.extend(layer.message for layer in merged.layers)
        built = Net(whole, TEST, Dialect.BVLC, where=net.where, seed=0, device=net.device, fused=False)
        self._passes = QuantizedNet(built, self.network)
        computed = {unit.blob for unit in self.network.units if unit.type != INPUT}
        self._unchanged = {unit.blob for unit in self.network.units} - computed
        """The inputs that no layer writes over."""

        self.ranges = SettlingRanges(self.network, net.where)
        norms = [layer for layer in net.layers if layer.type == "BatchNorm"]
        self._moving = {layer.name for layer in norms if not layer.batch_norm_param.use_global_stats}
        taken = [name for layer in merged.layers if layer.type in WEIGHTED for name in self._behind(layer)]
        self._types = {layer.name: layer.type for layer in merged.layers}
        self.quantized_layers = {*self._types, *taken}
        """The layers of ``net`` that lead to its prediction."""

        self._rest = self.rest_of(net)

    @property
    def fields(self) -> str:
        """How the net is quantized, as a network in the log says it."""
        return fields_of(self.network.scheme, sorted(self.network.floats))

    # What an iteration needs of a net

    @property
    def device(self) -> torch.device:
        return self.net.device

    @property
    def draws(self) -> bool:
        return self.net.draws

    recordable = False
    """The grids of weights are chosen on the CPU."""

    def reseed(self, seed: int) -> None:
        self.net.reseed(seed)

    def has_unused_weights(self) -> bool:
        return self.net.has_unused_weights()

    def forward(self, inputs: Mapping[str, Tensor]) -> NetResult:
        """One pass, as `Net.forward`; the ranges take it in while they settle."""
        settling = self.ranges.settling
        quantization, computed = self.prepared(self.net, frozen=self._frozen, see=settling)
        values = self.predicted(inputs, quantization, computed)
        result = self.net.compute(values, self._rest)
        if settling:
            self.ranges.end_pass(self._share)
        return result

    # The course of a training

    def resume(self, state: Mapping[str, Any], iteration: int, where: str) -> None:
        """Continue before ``iteration`` from a snapshot's ranges.

        Raises:
            UserError: as `SettlingRanges.load`.
        """
        self.ranges.load(state, where)
        self._frozen = iteration > self.freeze_from

    def check_statistics(self, weights: Path) -> None:
        """Raise `UserError` where a batch norm to fold has no statistics; they come from ``weights``."""
        lacking = {}
        for name in sorted(self._moving & self.quantized_layers):
            blobs = [array(tensor) for tensor in self.net.tensors_of(name)]
            if lacks_statistics(blobs, plain=False):
                lacking[name] = blobs
        require_statistics(weights, lacking)

    @torch.no_grad()
    def calibrate(self, inputs: Mapping[str, Tensor]) -> None:
        """Take in what a pass in float32 shows; `choose` follows."""
        _, computed = self.prepared(self.net, frozen=True, see=True, exact=True)
        self.predicted(inputs, None, computed)
        self.ranges.end_pass(self._share)

    def choose(self) -> None:
        """Choose the ranges by what the calibration has shown.

        Raises:
            UserError: one is not finite.
        """
        self.ranges.choose(self._share)

    def begin(self, iteration: int) -> bool:
        """Before ``iteration``; whether the statistics of batch norms stay from here on, and did not before.

        Raises:
            UserError: a range is not finite.
        """
        if self.ranges.settling and iteration >= self.settle_from:
            self.ranges.settle(self._share)
        before, self._frozen = self._frozen, iteration >= self.freeze_from
        return self._frozen and not before

    # The passes

    def rest_of(self, net: Net) -> list[Any]:
        """The steps of ``net`` that are computed from the prediction; `predicted` gives what they read."""
        rest = [step for step in net.steps if step.name not in self.quantized_layers]
        self._passes.outputs.update(name for step in rest for name in step.bottoms)
        return rest

    def predicted(
        self, inputs: Mapping[str, Tensor], quantization: Quantization | None, computed: Computed
    ) -> dict[str, Tensor]:
        """The inputs as they are, for layers such as a teacher, and the outputs of what is quantized."""
        values: dict[str, Tensor] = dict(inputs)
        for _ in self._passes.passing(inputs, quantization, values, computed):
            pass
        return values | {name: inputs[name] for name in self._unchanged}

    def prepared(
        self, net: Net, *, frozen: bool, see: bool = False, exact: bool = False
    ) -> tuple[Quantization | None, Computed]:
        """The grids of the present weights, and what a pass computes with; ``exact``: nothing is rounded.

        Args:
            net: the one in training, or one with its blobs.
            frozen: batch norms normalize by their running statistics.
            see: the ranges take in what the pass shows.
        """
        folded = {name: self._folding.folded(name) for name, kind in self._types.items() if kind in WEIGHTED}
        quantization = None if exact else self._grids(folded)
        blobs: dict[str, Sequence[Tensor]] = {}
        functions, after = dict(self._passes.functions), {}
        own = net.functions
        for name, kind in self._types.items():
            if kind in WEIGHTED:
                moves = not frozen and not self._moving.isdisjoint(self._folding.behind(name))
                blobs[name] = _blobs_of(name, folded[name], quantization, with_bias=not moves)
                if moves:
                    after[name] = partial(self._normalized, name, folded[name])
            elif kind == "BatchNorm" and (frozen or name not in self._moving):
                mean, variance = self._folding.averages(name)
                blobs[name] = [mean, variance, torch.ones_like(mean[:1])]
            elif name in own:
                functions[name] = own[name]
                blobs[name] = net.tensors_of(name)
        shown = self._see if see and self._ranks.first else None
        return quantization, Computed(blobs, functions, after, shown)

    def _see(self, unit: Unit, values: Tensor) -> None:
        if unit.name in self.ranges:
            sampled = self.network.scheme.activation_ranges != "minmax"
            seen = seen_of(unit, values.detach(), sampled=sampled)
            self.ranges.add(unit.name, seen.low, seen.high, seen.sample)

    def _behind(self, layer: Any) -> list[str]:
        return self._folding.behind(layer.name)

    def _grids(self, folded: Mapping[str, Folded]) -> Quantization:
        """The quantization of the present weights; it waits once for the device."""
        units = quantized_weights(self.network)
        weights = {unit: folded[unit.name].weights.detach() for unit in units}
        grids = _grids_to_the_largest if self.network.scheme.weight_ranges == "minmax" else _chosen_grids
        biases = iter(_on_cpu(bias for unit in units if (bias := folded[unit.name].bias) is not None))
        given = {unit.name: None if folded[unit.name].bias is None else next(biases) for unit in units}
        return with_grids(self.network, self.ranges.grids, grids(self.network, weights), given)

    def _normalized(self, name: str, folded: Folded, sums: Tensor) -> Tensor:
        """What layers with statistics of this batch make of a folded layer's sums without its bias."""
        assert folded.gain is not None
        over = (1, -1) + (1,) * (sums.dim() - 2)
        if folded.added is not None:
            sums = sums + folded.added.float().reshape(over)
        gain = torch.where(folded.gain == 0, 1.0, folded.gain).float()
        values = sums / gain.reshape(over)
        functions, own = self.net.functions, self.net.tensors_of(name)
        if len(own) > 1:
            values = values + own[1].reshape(over)
        for behind in self._folding.behind(name):
            made = functions[behind](self.net.tensors_of(behind), values)
            assert isinstance(made, Tensor)
            values = made
        return values

    def _share(self, numbers: list[float]) -> list[float]:
        if self._ranks.size == 1:
            return numbers
        shared = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self._ranks.copy_from_first([shared])
        return [float(number) for number in shared.tolist()]


class QuantizedTest:
    """The passes of a test net with the weights of a quantized training, as `Evaluator` takes them."""

    def __init__(self, training: QuantizedTraining, net: Net) -> None:
        """``net`` has the blobs of the net in training, and a step for each layer.

        Raises:
            UserError: it lacks a layer that is quantized in training.
        """
        there = {*(layer.name for layer in net.layers), *net.inputs}
        check_tested(training.quantized_layers, there, training.net.where, net.where)
        self._training, self._net = training, net
        self._rest = training.rest_of(net)
        self._prepared: tuple[Quantization | None, Computed] | None = None

    def begin(self) -> None:
        """Take the weights of the moment."""
        with torch.no_grad():
            self._prepared = self._training.prepared(self._net, frozen=True)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One pass; the net's outputs by name."""
        assert self._prepared is not None
        values = self._training.predicted(inputs, *self._prepared)
        return self._net.compute(values, self._rest).outputs


def layers_to_prediction(net: Net) -> list[Any]:
    """The layers that a network's prediction is computed by, with declared inputs in the place of its data.

    Raises:
        UserError: as `trained_part`.
    """
    part = trained_part(net.layers, net.where)
    read = {blob for layer in part for blob in layer.bottom}
    layers = []
    for layer in part:
        if layer.type in FED:
            layers += [_input(type(layer), top, net.shapes[top]) for top in layer.top if top in read]
            continue
        own = type(layer)()
        own.CopyFrom(layer)
        if own.type == "BatchNorm" and not own.batch_norm_param.use_global_stats:
            own.batch_norm_param.ClearField("use_global_stats")
        for rule in ("include", "exclude"):
            own.ClearField(rule)
        layers.append(own)
    return layers


def _input(kind: Any, name: str, shape: Sequence[int]) -> Any:
    layer = kind(name=name, type="Input", top=[name])
    layer.input_param.shape.add().dim.extend(shape)
    return layer


def _blobs_of(
    name: str, folded: Folded, quantization: Quantization | None, *, with_bias: bool
) -> list[Tensor]:
    """What a weighted layer computes with: whole numbers, the values of its grids, or its float values."""
    weights, bias = folded.weights, folded.bias if with_bias else None
    if quantization is not None and name in quantization.weights:
        grid = quantization.weights[name]
        weights = rounded(folded.weights, grid)
        if not quantization.in_whole_numbers(name):
            weights = weights * steps_over(weights, grid)
        elif bias is not None:
            factor = torch.from_numpy(quantization.factor(name)).to(bias, non_blocking=True)
            numbers = torch.from_numpy(quantization.bias_numbers(name, array(bias)))
            numbers = numbers.to(bias, non_blocking=True)
            bias = stands_for(bias, numbers, factor)
    if weights.dim() == 4:
        weights = weights.contiguous(memory_format=torch.channels_last)
    return [weights] if bias is None else [weights, bias]


def _grids_to_the_largest(network: Network, weights: Mapping[Unit, Tensor]) -> dict[str, Grid]:
    """The grids of weights whose ranges cover all of them: only the largest are copied from the device."""
    axes = {unit: network.axis_of_steps(unit) for unit in weights}
    reaches = _on_cpu(_reach(values, axes[unit]) for unit, values in weights.items())
    return {
        unit.name: symmetric_grid(
            reach,
            network.bits_of(unit).weights,
            axis=axes[unit],
            power_of_two=network.scheme.power_of_two,
        )
        for unit, reach in zip(weights, reaches, strict=True)
    }


def _chosen_grids(network: Network, weights: Mapping[Unit, Tensor]) -> dict[str, Grid]:
    """The grids of weights whose ranges leave some of them out."""
    return {unit.name: grid_of_weights(network, unit, array(values)) for unit, values in weights.items()}


def _reach(weights: Tensor, axis: int | None) -> Tensor:
    """The largest magnitude of each channel along ``axis``, or of all."""
    sizes = weights.abs()
    return sizes.amax().reshape(1) if axis is None else sizes.movedim(axis, 0).flatten(1).amax(1)


def _on_cpu(tensors: Iterable[Tensor]) -> list[NDArray[np.float32]]:
    """Their numbers, in one copy."""
    given = [tensor.detach().reshape(-1) for tensor in tensors]
    if not given:
        return []
    together = torch.cat(given).cpu()
    return [part.numpy() for part in together.split([tensor.numel() for tensor in given])]
