"""The rule of sparsification applied once to a weight file: for trying, without training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caffe_jacinto.caffemodel.fit import check_fit
from caffe_jacinto.caffemodel.net_file import NetLayer, NewLayer, open_net, write_net
from caffe_jacinto.caffemodel.storage import blob_values, mapped, stored_layers
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.pruning.rule import MAXRATIO, VALUE_MAX, By, prune


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


def layer_zeros(weights: Path, net: Any) -> dict[str, int]:
    """The zeros in the first blob of each layer of a weight file that fits ``net``, a NetParameter message.

    One blob's numbers are in memory at a time.

    Raises:
        UserError: the file is missing or damaged, or does not fit the network.
    """
    import numpy as np

    wrong = check_fit(weights, net)
    if wrong:
        raise UserError(f"{weights} does not fit the network: {wrong[0]}; give the prototxt of these weights")
    with mapped(weights) as view:
        found = {}
        for layer in stored_layers(view, weights):
            values = blob_values(view, layer.blobs[0])
            found[layer.name] = values.size - int(np.count_nonzero(values))
        return found


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


def sparsify(
    source: Path,
    target: Path,
    dialect: Dialect,
    *,
    fraction: float,
    by: By = "channel",
    maxratio: float = MAXRATIO,
    value_max: float = VALUE_MAX,
) -> list[str]:
    """Write ``source`` to ``target`` with the small weights of its convolutions zero, as one threshold step
    with the factor ``fraction`` takes them (see thresholds.py).

    One layer's weights are in memory at a time. Returns the names of the layers that took part.

    Raises:
        UserError: the file is missing, cut off or no weight file.
    """
    thinned: list[str] = []

    def new_layers(layers: list[NetLayer]) -> Iterator[NewLayer]:
        scores = {
            name for layer in layers if layer.type.startswith("Softmax") for name in layer.header.bottom
        }
        for layer in layers:
            kept = [(layer.view, blob) for blob in layer.blobs]
            group = layer.header.convolution_param.group
            counts = layer.type == "Convolution" and layer.blobs and not scores.intersection(layer.header.top)
            weights = layer.values(0) if counts else None
            if weights is None or not prune(
                weights, group, fraction, by=by, maxratio=maxratio, value_max=value_max
            ):
                yield NewLayer(layer.header, kept)
                continue
            thinned.append(layer.name)
            yield NewLayer(layer.header, [weights, *kept[1:]])

    with open_net(source, dialect) as (name, layers):
        write_net(target, name, new_layers(layers), dialect)
    return thinned
