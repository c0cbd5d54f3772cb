"""Passes through a quantized network on stock Caffe: layer by layer, blobs rounded in place between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from caffe_jacinto.quantization.network import Network, Quantization, rounded_blobs
from caffe_jacinto.quantization.passes import Seen, seen_values
from caffe_jacinto.quantization.units import INPUT, Unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.float32]


class CaffeQuantizedNet:
    """A network, with passes in float32 and with any quantization of it."""

    def __init__(self, caffe: Any, deploy: Path, network: Network) -> None:
        """``caffe`` is pycaffe's module, ``deploy`` a network that it can load."""
        self.network = network
        self._net = caffe.Net(str(deploy), caffe.TEST)
        self._filled: Quantization | None = None
        self._fill(None)
        self._ends = {unit.layers[-1]: unit for unit in network.units if unit.layers}

    def passing(self, images: Values, quantization: Quantization | None) -> Iterator[tuple[Unit, Values]]:
        """One pass; each unit with the values of its output, which the next step overwrites.

        ``images`` are batch x channels x height x width.
        """
        if quantization is not self._filled:
            self._fill(quantization)
        for unit in self.network.units:
            if unit.type == INPUT:
                self._net.blobs[unit.blob].reshape(*images.shape)
                self._net.reshape()
                self._net.blobs[unit.blob].data[...] = images
                yield unit, self._rounded(unit, quantization)
        # By name: Caffe puts layers of its own between them, which share a blob among its readers.
        for name in self._net._layer_names:
            self._net.forward(start=name, end=name)
            if name in self._ends:
                yield self._ends[name], self._rounded(self._ends[name], quantization)

    def scores(self, images: Values, quantization: Quantization | None) -> Values:
        """The network's output, images x classes."""
        for _, made in self.passing(images, quantization):
            last = made
        scores: Values = last.reshape(len(images), -1).copy()
        return scores

    def seen(self, images: Values, quantization: Quantization | None, *, sampled: bool) -> Iterator[Seen]:
        """The range of each output that is quantized, in one pass; ``sampled``: with some of its values."""
        for unit, made in self.passing(images, quantization):
            if unit.output == "quantized":
                yield seen_values(unit, made, sampled=sampled)

    def signal_and_noise(
        self, images: Values, quantization: Quantization
    ) -> Iterator[tuple[Unit, float, float]]:
        """The energy of each quantized unit's output, and that of what quantization changes in it."""
        exact = {unit.name: made.copy() for unit, made in self.passing(images, None)}
        for unit, made in self.passing(images, quantization):
            if unit.output == "quantized":
                values = exact.pop(unit.name)
                yield unit, _energy(values), _energy(made - values)

    def mean_errors(self, images: Values, quantization: Quantization) -> Iterator[tuple[Unit, Values]]:
        """What quantizing the weights of each unit alone adds to its output channels, on average."""
        self._fill(None)
        units = {unit.name: unit for unit in self.network.units if unit.name in quantization.weights}
        for unit in self.network.units:
            if unit.type == INPUT:
                self._net.blobs[unit.blob].reshape(*images.shape)
                self._net.reshape()
                self._net.blobs[unit.blob].data[...] = images
        for name in self._net._layer_names:
            if name in units:
                rounded = rounded_blobs(self.network, quantization, name)[0]
                errors = []
                for weights in (rounded, self.network.blobs[name][0]):
                    self._net.params[name][0].data[...] = weights
                    self._net.forward(start=name, end=name)
                    made = self._net.blobs[self._net.top_names[name][0]].data
                    errors.append(made.mean(axis=tuple(axis for axis in range(made.ndim) if axis != 1)))
                yield units[name], errors[0] - errors[1]
            else:
                self._net.forward(start=name, end=name)

    def _fill(self, quantization: Quantization | None) -> None:
        """Give the network the weights of ``quantization``."""
        for name, blobs in self.network.blobs.items():
            rounded = quantization is not None and name in quantization.weights
            values = rounded_blobs(self.network, quantization, name) if quantization and rounded else blobs
            for index, blob in enumerate(values):
                self._net.params[name][index].data[...] = blob
        self._filled = quantization

    def _rounded(self, unit: Unit, quantization: Quantization | None) -> Values:
        """The unit's output, rounded in place where it has a grid."""
        data: Values = self._net.blobs[unit.blob].data
        grid = quantization.outputs.get(unit.name) if quantization else None
        if grid is not None:
            data[...] = grid.rounded(data)
        return data


def _energy(values: Values) -> float:
    return float(np.square(values, dtype=np.float64).sum())
