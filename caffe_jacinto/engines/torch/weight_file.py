"""A net's blobs from and to a ``.caffemodel``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from caffe_jacinto.caffemodel.fit import check_fit, unused_layers
from caffe_jacinto.caffemodel.net_file import NewLayer, net_parts
from caffe_jacinto.caffemodel.weights import read_weights
from caffe_jacinto.engines.torch.net import Net
from caffe_jacinto.errors import UserError
from caffe_jacinto.files import write_whole
from caffe_jacinto.prototxt.schema import messages

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def load_weights(net: Net, path: Path) -> tuple[list[str], list[str]]:
    """Fill the blobs of ``net`` from ``path``, by the layers' names.

    Returns the layers that the file lacks, which keep what they have, and those that the net lacks.

    Raises:
        UserError: the file is missing or damaged, or a layer in it has other shapes than in the net.
    """
    definition = messages(net.dialect).NetParameter(layer=net.layers)
    wrong = [mismatch for mismatch in check_fit(path, definition) if mismatch.fatal]
    if wrong:
        more = f" (and {len(wrong) - 1} more layers)" if len(wrong) > 1 else ""
        raise UserError(f"{path} does not fit {net.where}: {wrong[0]}{more}")
    stored = read_weights(path)
    missing = []
    for name, blobs in net.layer_blobs.items():
        if name not in stored:
            missing.append(name)
            continue
        if len(stored[name]) != len(blobs):
            raise UserError(
                f"{path}: layer {name} has {len(stored[name])} blobs, {len(blobs)} in {net.where}"
            )
        for index, (blob, values) in enumerate(zip(blobs, stored[name], strict=True)):
            if values.size != blob.tensor.numel():
                raise UserError(
                    f"{path}: layer {name}: blob {index} is {values.shape}, "
                    f"{tuple(blob.tensor.shape)} in {net.where}"
                )
            put(values, blob.tensor)
    return missing, unused_layers(path, definition)


def save_weights(net: Net, path: Path) -> None:
    """Write all layers of ``net`` with their blobs, as Caffe does, whole or not at all."""
    new = [NewLayer(_header(net, layer), _arrays(net, layer.name)) for layer in net.layers]
    write_whole(path, net_parts(net.name, new, net.dialect))


def array(tensor: Tensor) -> NDArray[np.float32]:
    """The numbers of ``tensor`` in the order of Caffe's blobs."""
    values: NDArray[np.float32] = tensor.detach().cpu().contiguous().numpy()
    return values


def put(values: NDArray[np.float32], tensor: Tensor) -> None:
    """Copy numbers in the order of Caffe's blobs into ``tensor``."""
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(values.reshape(tuple(tensor.shape))))


def _header(net: Net, layer: Any) -> Any:
    header = type(layer)()
    header.CopyFrom(layer)
    header.ClearField("blobs")
    header.phase = net.phase
    return header


def _arrays(net: Net, layer: str) -> list[NDArray[np.float32]]:
    return [array(blob.tensor) for blob in net.layer_blobs.get(layer, [])]
