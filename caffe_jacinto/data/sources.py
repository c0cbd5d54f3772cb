"""The layers whose batches are read here: a table from a layer's type to the source of its batches."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.batches import BatchSource, Images, data_layer
from caffe_jacinto.data.hdf5_rows import Rows, hdf5_layer
from caffe_jacinto.data.lmdb_reader import check_lmdb
from caffe_jacinto.netspec.data_fit import LISTED, READ, given_shape
from caffe_jacinto.netspec.graph import messages_in
from caffe_jacinto.netspec.layer_types import DATA_PARAMETERS
from caffe_jacinto.prototxt.tree import tree_of


def source_of(layer: Any, where: str, *, training: bool, seed: int = 0, shuffle: bool = False) -> BatchSource:
    """The batches of ``layer`` (a LayerParameter of a type in `READ`), of the size that it says.

    ``where`` is its file; ``shuffle`` asks for another order each time, whatever the layer says.

    Raises:
        UserError: a field that is not supported, or data that cannot be read or do not fit.
    """
    if layer.type == "HDF5Data":
        rows = hdf5_layer(layer, where)
        return Rows(rows, rows.batch_size, seed, shuffle=shuffle)
    images = data_layer(layer, where, training=training)
    return Images(images, images.batch_size, seed, shuffle=shuffle)


def listed_shapes(net: Any, phase: str | None, where: str) -> dict[str, tuple[int, ...]]:
    """The shape of the first top of each layer of ``net`` that reads a list, by the layer's name.

    Lists that cannot be read are left out: what reads them says why.
    """
    found: dict[str, tuple[int, ...]] = {}
    for layer in messages_in(net, phase):
        if layer.type in LISTED:
            with suppress(UserError):
                found[layer.name] = source_of(layer, where, training=False).top_shapes[0]
    return found


def shapes_of_data(net: Any, phase: str | None, where: str) -> dict[str, tuple[int, ...]]:
    """As `listed_shapes`, with the layers that read LMDBs, for a batch of 1.

    One that has a crop and names no channels gets those of its LMDB.
    """
    found = listed_shapes(net, phase, where)
    for layer in messages_in(net, phase):
        if layer.type == "Data":
            with suppress(UserError, OSError):
                source = layer.data_param.source
                facts = check_lmdb(source, num_classes=None, min_images=1, min_size=1, channels=None)
                shape = given_shape(tree_of(layer), facts.size)
                if shape is not None:
                    found[layer.name] = (1, *shape)
    return found


def parameters_of(layer: Any) -> Any:
    """The message in which a layer that reads a data set has its source and batch size."""
    return getattr(layer, DATA_PARAMETERS[layer.type])


def reading(layers: Iterable[Any]) -> list[Any]:
    """Those of ``layers`` whose batches are read here."""
    return [layer for layer in layers if layer.type in READ]
