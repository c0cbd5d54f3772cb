"""The sparsity of a weight file: zeros over weights, in the convolutions' weights.

One directly before the softmax is left out, and so are biases and inner products.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caffe_jacinto.caffemodel.blobs import mapped, stored_layers
from caffe_jacinto.caffemodel.weights import blob_values


@dataclass(frozen=True)
class LayerSparsity:
    """One convolution."""

    name: str
    zeros: int
    weights: int

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights


def total_sparsity(layers: list[LayerSparsity]) -> float:
    """Zeros over weights of all ``layers``; 0 without any."""
    return sum(layer.zeros for layer in layers) / max(sum(layer.weights for layer in layers), 1)


def convolution_names(net: Any) -> list[str]:
    """The convolutions of ``net`` (a NetParameter message) whose zeros count."""
    scores = {
        bottom for layer in net.layer if layer.type.startswith("Softmax") for bottom in layer.bottom[:1]
    }
    return [
        layer.name
        for layer in net.layer
        if layer.type == "Convolution" and not scores.intersection(layer.top)
    ]


def conv_sparsity(weights: Path, net: Any) -> list[LayerSparsity]:
    """The sparsity of each convolution of ``net`` in the file ``weights``, in the network's order.

    One layer's weights are in memory at a time.

    Raises:
        UserError: the file is missing, cut off or no weight file.
    """
    import numpy as np

    with mapped(weights) as view:
        stored = {layer.name: layer for layer in stored_layers(view, weights)}
        found = []
        for name in convolution_names(net):
            if name in stored:
                values = blob_values(view, stored[name].blobs[0])
                found.append(LayerSparsity(name, values.size - int(np.count_nonzero(values)), values.size))
    return found
