"""Whether a weight file fits a network: the names and shapes of its layers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from caffe_jacinto.caffemodel.hdf5 import is_hdf5
from caffe_jacinto.caffemodel.net_file import NewLayer, net_parts, open_net
from caffe_jacinto.caffemodel.storage import Blob, StoredLayer, mapped, read_weights, stored_layers
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.netspec.graph import TRAIN, shared_blobs
from caffe_jacinto.netspec.layer_types import Shape
from caffe_jacinto.netspec.shapes import DataShapes, blob_shapes
from caffe_jacinto.prototxt.schema import dialect_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FORMS = {3: "stock Caffe's, of three blobs", 5: "caffe-jacinto's, of five blobs"}


@dataclass(frozen=True)
class Mismatch:
    """One layer of the network that the weight file does not fill."""

    layer: str
    reason: str
    cause: Literal["missing", "shape", "other Caffe"]
    """The file lacks the layer, has it in another shape, or was written by the other kind of Caffe."""

    fatal: bool
    """Whether Caffe would refuse the file. It does not where a layer is missing: that keeps its random
    values, as a new head on a trained network should."""

    def __str__(self) -> str:
        return f"{self.layer}: {self.reason}"


def check_fit(weights: Path, net: Any, data_shapes: DataShapes = ()) -> list[Mismatch]:
    """The layers of ``net`` (a NetParameter message, in the TRAIN phase) that ``weights`` does not fill.

    Caffe matches layers by name, and ignores those that the network does not have. Where the file fills no
    layer at all, every mismatch is fatal. ``data_shapes`` are the shapes (batch, channels, height, width)
    that the data layers give, in order, where they are known: without them any number of input channels fits.

    Raises:
        UserError: the file is missing, cut off or not a weight file.
    """
    with mapped(weights) as view:
        stored = {layer.name: layer for layer in stored_layers(view, weights)}
    expected = blob_shapes(net, TRAIN, data_shapes)
    nothing_fits = not any(name in stored for name in expected)
    shared = shared_blobs(net) if is_hdf5(weights) else {}
    mismatches = []
    for name, shapes in expected.items():
        elsewhere = shared.get(name, {})
        if name not in stored:
            if len(elsewhere) == len(shapes):
                continue
            mismatches.append(Mismatch(name, "not in the weight file", "missing", fatal=nothing_fits))
        elif reason := _other_caffe(stored[name], shapes):
            mismatches.append(Mismatch(name, reason, "other Caffe", fatal=True))
        elif reason := _other_shape(stored[name], shapes, elsewhere):
            mismatches.append(Mismatch(name, reason, "shape", fatal=True))
    return mismatches


def require_fit(weights: Path, net: Any, where: str) -> None:
    """Raise `UserError` unless ``weights`` fills all of ``net``, whose prototxt messages call ``where``."""
    wrong = check_fit(weights, net)
    if wrong:
        raise UserError(f"{weights} does not fit {where}: {wrong[0]}; give the weights of this network")


def unused_layers(weights: Path, net: Any) -> list[str]:
    """The layers of ``weights`` that ``net`` does not have, which Caffe ignores.

    Raises:
        UserError: as `check_fit`.
    """
    with mapped(weights) as view:
        names = [layer.name for layer in stored_layers(view, weights)]
    known = {layer.name for layer in net.layer}
    return [name for name in names if name not in known]


def weights_for(path: Path, net: Any) -> dict[str, list[NDArray[np.float32]]]:
    """As `storage.read_weights`; a blob that an HDF5 file leaves out is that of the layer that shares it.

    Raises:
        UserError: as `storage.read_weights`.
    """
    if not is_hdf5(path):
        return read_weights(path)
    with open_net(path, dialect_of(net), net) as (_, layers):
        return {
            layer.name: [layer.values(index) for index in range(len(layer.blobs))]
            for layer in layers
            if layer.blobs
        }


def in_binary_form(path: Path, net: Any, without: Collection[str] = ()) -> bytes:
    """The HDF5 weight file ``path``, of the network ``net``, in the binary form that every Caffe reads.

    ``without`` are layers to leave out. The Caffe that install_caffe.sh builds takes an HDF5 file for an
    empty one, without a word.

    Raises:
        UserError: as `storage.read_weights`.
    """
    dialect = dialect_of(net)
    with open_net(path, dialect, net) as (name, layers):
        new = [
            NewLayer(layer.header, [(layer.view, blob) for blob in layer.blobs])
            for layer in layers
            if layer.name not in without
        ]
        return b"".join(net_parts(name, new, dialect))


def _other_caffe(layer: StoredLayer, shapes: list[Shape]) -> str | None:
    """Why the stored layer must have been written by the other kind of Caffe; None where it need not."""
    counts = (len(layer.blobs), len(shapes))
    if counts not in ((3, 5), (5, 3)):
        return None
    return (
        f"its batch normalization is {_FORMS[counts[0]]}, the network's is {_FORMS[counts[1]]}: "
        "the weights were written by the other kind of Caffe; convert them first: "
        "python -m caffe_jacinto.weights convert"
    )


def _other_shape(layer: StoredLayer, shapes: list[Shape], elsewhere: Collection[int]) -> str | None:
    """Why the stored layer does not fill blobs of ``shapes``, save those ``elsewhere``; None if it does."""
    count = len(layer.blobs)
    if count > len(shapes) or not all(index in elsewhere for index in range(count, len(shapes))):
        return f"{count} blobs in the weight file, {len(shapes)} in the network"
    for index, (blob, shape) in enumerate(zip(layer.blobs, shapes, strict=False)):
        if index in elsewhere and not blob.ranges:
            continue
        if not _fills(blob, shape):
            return (
                f"blob {index} is {_written(blob.shape)} in the weight file, {_written(shape)} in the network"
            )
    return None


def _fills(blob: Blob, shape: Shape) -> bool:
    # One number, as a batch norm's factor is, may be stored without axes.
    if _equal(blob.shape, shape) or (not blob.shape and shape == (1,)):
        return True
    if blob.four_axes:
        return _equal(blob.shape, (1,) * (4 - len(shape)) + shape) or _per_channel(blob, shape)
    return _per_channel(blob, shape)


def _per_channel(blob: Blob, shape: Shape) -> bool:
    """Whether both have one number per channel: forks store these as 1 x C or as 1 x C x 1 x 1."""
    stored, expected = _channels(blob.shape), _channels(shape)
    return len(stored) == len(expected) == 1 and expected[0] in (None, stored[0])


def _channels(shape: Shape) -> Shape:
    """C of a shape C, 1 x C or 1 x C x 1 x 1; empty where it is none of them."""
    if len(shape) == 1:
        return shape
    return shape[1:2] if shape[:1] == (1,) and shape[2:] in ((), (1, 1)) else ()


def _equal(stored: tuple[int, ...], expected: Shape) -> bool:
    return len(stored) == len(expected) and all(
        dim is None or dim == have for have, dim in zip(stored, expected, strict=True)
    )


def _written(shape: Shape) -> str:
    return " x ".join("?" if dim is None else str(dim) for dim in shape) or "one number"
