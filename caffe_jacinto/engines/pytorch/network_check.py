"""Mistakes in the networks of a solver, each with its file and line, before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from caffe_jacinto.common.errors import UserError, UserErrors
from caffe_jacinto.data.lmdb_reader import check_lmdb
from caffe_jacinto.netspec.data_fit import DataSize, Reading, mistakes_with_data, source_of
from caffe_jacinto.netspec.graph import alone, state_of
from caffe_jacinto.prototxt.solver import Written
from caffe_jacinto.prototxt.tree import tree_of


def check_networks(networks: Sequence[tuple[Written, Any]]) -> None:
    """Check networks that share their weights: each as it is written, and its message in its state.

    Data that cannot be read are left to what opens them.

    Raises:
        UserErrors: one line for each mistake.
    """
    size_of = cache(_size_of)
    readings = []
    for written, definition in networks:
        state = state_of(tree_of(definition))
        assert state is not None  # a network that is trained or tested has a phase
        net = alone(written.tree(definition), state)
        sources = {source_of(layer) for layer in net.messages("layer") if layer.string("type") == "Data"}
        sizes = {source: (source, size) for source in sources if (size := size_of(source))}
        readings.append(Reading(net, str(written.file), sizes))
    found = mistakes_with_data(readings)
    if found:
        raise UserErrors(found)


def _size_of(lmdb: str) -> DataSize | None:
    try:
        return check_lmdb(lmdb, num_classes=None, min_images=1, min_size=1, channels=None).size
    except (UserError, OSError):
        return None
