"""The pruning rule applied to a weight file, once, without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.pruning.layers import find_counted, why_not_pruned, wrong_names
from caffe_jacinto.pruning.rule import pruned_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from caffe_jacinto.caffemodel.net_file import NetLayer, NewLayer
    from caffe_jacinto.prototxt.dialects import Dialect
    from caffe_jacinto.recipes.model import SparseSettings


def sparsify(
    source: Path,
    target: Path,
    dialect: Dialect,
    sparse: SparseSettings,
    factor: float,
    network: Any | None = None,
) -> list[str]:
    """Write ``source`` to ``target`` with the weights set to zero that a threshold of ``factor`` zeroes.

    One layer's weights are in memory at a time; see `rule.pruned_weights`. Returns the names of the layers
    that were pruned. ``network`` is that of an HDF5 file, as for `open_net`.

    Raises:
        UserError: the file is missing, cut off or not a weight file, or has no layer of a name in ``sparse``.
    """
    from caffe_jacinto.caffemodel.net_file import NewLayer, open_net, require_types, write_net

    with open_net(source, dialect, network) as (name, layers):
        require_types(source, layers)
        headers = [layer.header for layer in layers]
        for key, what in wrong_names(headers, sparse):
            raise UserError(f"{source}: --{key}: {what}")
        stored: dict[str, NetLayer] = {}
        for layer in layers:
            if layer.blobs:
                stored.setdefault(layer.name, layer)

        def shape_of(name: str) -> tuple[int, ...] | None:
            return tuple(stored[name].blobs[0].shape) if name in stored else None

        def read(name: str) -> NDArray[np.float32]:
            return stored[name].values(0)

        found = find_counted(headers, shape_of, inner_products=sparse.inner_products)
        by_name = {layer.name: layer for layer in found}
        counted = [by_name[name] for name in stored if name in by_name]
        pruned = [layer.name for layer in counted if why_not_pruned(layer, sparse) is None]

        def new_layers() -> Iterator[NewLayer]:
            # The weights come in the order of `counted`, which is the file's.
            changed = pruned_weights(counted, sparse, factor, read)
            for layer in layers:
                blobs = [(layer.view, blob) for blob in layer.blobs]
                if layer.name in pruned and stored.get(layer.name) is layer:
                    _, weights = next(changed)
                    yield NewLayer(layer.header, [weights, *blobs[1:]])
                else:
                    yield NewLayer(layer.header, blobs)

        write_net(target, name, new_layers(), dialect)
    return pruned
