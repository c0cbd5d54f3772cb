"""Batch norms folded into convolutions while they learn: the blobs of the merged network, with gradients.

`export/merge_bn.py` decides what is folded, by a network's structure alone. The arithmetic here is its own,
in the same precision and order, so that the numbers are the same to the bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from caffe_jacinto.caffemodel.net_file import NewLayer, write_net
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.engines.pytorch.snapshot import array
from caffe_jacinto.export.merge_bn import merge_bn
from caffe_jacinto.export.stock_net import StockNet
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.quantization.units import WEIGHTED


@dataclass(frozen=True)
class Folded:
    """A convolution or inner product with what is folded into it."""

    weights: Tensor
    bias: Tensor | None
    gain: Tensor | None
    """What each output channel was multiplied by; None: nothing is folded into it from behind."""

    added: Tensor | None
    """The part of the bias that comes from a shift of the input."""


@dataclass(frozen=True)
class _Plan:
    """What is folded into a layer, in order."""

    message: Any
    behind: tuple[Any, ...]
    """Messages of layers that follow it."""

    before: tuple[Any, ...]


class Folding:
    """The merged form of the layers of a net in training that lead to its prediction."""

    def __init__(self, net: Net, layers: Sequence[Any], where: str) -> None:
        """``layers`` are LayerParameter messages: those of ``net`` that are folded, and declared inputs.

        Raises:
            UserError: as `merge_bn`.
        """
        self._net = net
        from google.protobuf import text_format

        whole = type(net.definition)(name=net.name)
        whole.layer.extend(layers)
        with tempfile.TemporaryDirectory() as scratch:
            weights = Path(scratch) / "structure.caffemodel"
            write_net(weights, net.name, [_new(net, layer) for layer in layers], net.dialect)
            merged = merge_bn(text_format.MessageToString(whole, as_utf8=True), where, net.dialect, weights)
        self.merged: StockNet = merged.net
        """What is computed; its blobs are not those of ``net``."""

        order = {layer.name: at for at, layer in enumerate(layers)}
        messages = {layer.name: layer for layer in layers}
        self._plans = {}
        for layer in self.merged.layers:
            if layer.type in WEIGHTED:
                taken = merged.merged.get(layer.name, [])
                behind = [messages[name] for name in taken if order[name] > order[layer.name]]
                before = [messages[name] for name in taken if order[name] < order[layer.name]]
                self._plans[layer.name] = _Plan(layer.message, tuple(behind), tuple(before))

    def behind(self, layer: str) -> list[str]:
        """The layers that are folded into ``layer`` from behind, in order."""
        return [message.name for message in self._plans[layer].behind]

    def folded(self, layer: str) -> Folded:
        """The convolution or inner product ``layer`` as the net's present blobs make it."""
        plan = self._plans[layer]
        weights, *others = self._net.tensors_of(layer)
        bias = others[0].reshape(-1) if others else None
        gain: Tensor | None = None
        for message in plan.behind:
            factor, shift = self._gain_and_shift(message)
            gain = factor if gain is None else gain * factor
            bias = (shift if bias is None else factor * bias.double() + shift).float()
            weights = (weights.double() * _along(plan.message, factor, weights)).float()
        added: Tensor | None = None
        for message in plan.before:
            part = _through_weights(plan.message, weights.double(), self._shift(message))
            added = part if added is None else added + part
            bias = (part if bias is None else bias.double() + part).float()
        return Folded(weights, bias, gain, added)

    def averages(self, layer: str) -> tuple[Tensor, Tensor]:
        """Mean and variance of a BatchNorm of the net, as `caffemodel.batch_norm.averages`."""
        mean, variance, factor = self._net.tensors_of(layer)
        inverse = torch.where(factor == 0, 0.0, 1 / factor)
        return mean * inverse, variance * inverse

    def _gain_and_shift(self, message: Any) -> tuple[Tensor, Tensor]:
        if message.type == "BatchNorm":
            mean, variance = self.averages(message.name)
            gain = 1 / torch.sqrt(variance.double() + message.batch_norm_param.eps)
            return gain, -mean.double() * gain
        values = [blob.reshape(-1).double() for blob in self._net.tensors_of(message.name)]
        if message.type == "Bias":
            return torch.ones_like(values[0]), values[0]
        return values[0], values[1] if len(values) > 1 else torch.zeros_like(values[0])

    def _shift(self, message: Any) -> Tensor:
        """What a layer before a convolution adds to its input."""
        if message.type == "Bias":
            return self._net.tensors_of(message.name)[0].reshape(-1).double()
        return torch.tensor([message.power_param.shift], dtype=torch.float64, device=self._net.device)


def _new(net: Net, layer: Any) -> NewLayer:
    """A layer's blobs as they are now; of a batch norm, statistics of one image."""
    blobs = [array(tensor) for tensor in net.tensors_of(layer.name)]
    if layer.type == "BatchNorm" and net.dialect is Dialect.BVLC:
        blobs[2] = np.ones_like(blobs[2])
    return NewLayer(layer, blobs)


def _along(message: Any, factor: Tensor, weights: Tensor) -> Tensor:
    """One ``factor`` for each output, in a shape that goes over ``weights``."""
    if message.type == "Deconvolution":  # inputs of all groups x outputs of one group x kernel
        groups = message.convolution_param.group
        by_input = factor.reshape(groups, -1).repeat_interleave(len(weights) // groups, 0)
        return by_input.reshape(weights.shape[:2] + (1,) * (weights.dim() - 2))
    if message.type == "InnerProduct" and message.inner_product_param.transpose:
        return factor
    return factor.reshape(-1, *[1] * (weights.dim() - 1))


def _through_weights(message: Any, weights: Tensor, shift: Tensor) -> Tensor:
    """What a shift of the input channels adds to each output."""
    if message.type == "InnerProduct":
        if message.inner_product_param.transpose:
            weights = weights.T
        return weights @ shift.repeat_interleave(weights.shape[1] // len(shift))
    group = message.convolution_param.group
    sums = weights.reshape(group, len(weights) // group, weights.shape[1], -1).sum(3)
    return torch.einsum(
        "goi,gi->go", sums, shift.expand(group * weights.shape[1]).reshape(group, -1)
    ).reshape(-1)
