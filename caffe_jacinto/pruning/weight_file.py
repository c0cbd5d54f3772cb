"""One threshold of the pruning rule applied to a weight file: to try it, without training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from caffe_jacinto.caffemodel.net_file import NetLayer, NewLayer, open_net, write_net
from caffe_jacinto.netspec.graph import counted_convolutions, nodes_of
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.pruning.rule import MAXRATIO, VALUE_MAX, By, prune


def sparsify(
    source: Path,
    target: Path,
    dialect: Dialect,
    *,
    factor: float,
    by: By = "channel",
    maxratio: float = MAXRATIO,
    value_max: float = VALUE_MAX,
) -> list[str]:
    """Write ``source`` to ``target`` with the small weights of its convolutions set to zero.

    These are the weights that a training zeroes at a threshold of ``factor``. One layer's weights are in
    memory at a time. Returns the names of the layers that were pruned.

    Raises:
        UserError: the file is missing, cut off or not a weight file.
    """
    pruned: list[str] = []

    def new_layers(layers: list[NetLayer]) -> Iterator[NewLayer]:
        counted = set(counted_convolutions(nodes_of(layer.header for layer in layers)))
        for layer in layers:
            blobs = [(layer.view, blob) for blob in layer.blobs]
            group = layer.header.convolution_param.group
            weights = layer.values(0) if layer.name in counted and blobs else None
            if weights is not None and prune(
                weights, group, factor, by=by, maxratio=maxratio, value_max=value_max
            ):
                pruned.append(layer.name)
                yield NewLayer(layer.header, [weights, *blobs[1:]])
            else:
                yield NewLayer(layer.header, blobs)

    with open_net(source, dialect) as (name, layers):
        write_net(target, name, new_layers(layers), dialect)
    return pruned
