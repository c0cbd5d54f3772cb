"""Snapshots of a training: ``.caffemodel`` and ``.solverstate`` as Caffe has them, for an exact resume.

The solver state is Caffe's message, which stock Caffe reads, too. One more field follows, which protobuf
ignores: the seed and the number of images that the training has seen. Order, crops, mirroring and dropout
follow from these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from caffe_jacinto.caffemodel import hdf5
from caffe_jacinto.caffemodel.fit import check_fit, unused_layers, weights_for
from caffe_jacinto.caffemodel.net_file import NewLayer, net_parts
from caffe_jacinto.caffemodel.storage import (
    STATE,
    blob_values,
    check_kind,
    damaged,
    mapped,
    stored_state,
)
from caffe_jacinto.caffemodel.wire import (
    LENGTH,
    STATE_HISTORY,
    STATE_PLACE,
    STATE_RANGES,
    NotWholeError,
    array_parts,
    field_parts,
    fields,
)
from caffe_jacinto.common.errors import RunFailed, UserError
from caffe_jacinto.common.files import parse_json, write_whole
from caffe_jacinto.engines.pytorch.net import Net
from caffe_jacinto.engines.snapshots import layer_of_no_numbers, no_numbers
from caffe_jacinto.prototxt.dialects import Dialect
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
    stored = weights_for(path, definition)
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


def save_weights(net: Net, path: Path, updates: Mapping[Tensor, Tensor] | None = None) -> None:
    """Write all layers of ``net`` with their blobs, as Caffe does, atomically; ``.h5`` files as HDF5.

    ``updates``: of each blob, what its last update subtracted, which is written, too (``snapshot_diff``).

    Raises:
        RunFailed: a weight is not a number. Nothing was written.
    """
    weights = {layer.name: _arrays(net, layer.name) for layer in net.layers}
    diffs = None
    if updates is not None:
        diffs = {name: [array(updates[tensor]) for tensor in net.tensors_of(name)] for name in weights}
    wrong = layer_of_no_numbers(weights)
    if wrong is not None:
        raise RunFailed(f"{path.name} is not written: {no_numbers(wrong)}")
    if path.suffix == hdf5.SUFFIX:
        own = {(layer, index) for layer, index, _ in net.blobs}
        hdf5.write_weights(
            path,
            {
                layer: {index: values for index, values in enumerate(blobs) if (layer, index) in own}
                for layer, blobs in weights.items()
            },
            diffs,
        )
        return
    new = [
        NewLayer(_header(net, layer), weights[layer.name], (diffs or {}).get(layer.name, ()))
        for layer in net.layers
    ]
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


@dataclass(frozen=True)
class Place:
    """The place of a training in its data."""

    seed: int
    images: int
    """Seen so far, by all ranks together."""

    dialect: str | None = None
    """The dialect of its prototxts, if known: the same blobs mean something else in the other."""

    solver: str | None = None
    """The type of its solver, if known: the same history means something else to another."""

    decode: Literal["cpu", "gpu", "both"] | None = None
    """Where its images are decoded, if known: the pixels differ a little."""

    precision: Literal["fp32", "tf32", "bf16"] | None = None
    """In which it computes, if known."""


def write_state(
    path: Path,
    *,
    iteration: int,
    current_step: int,
    learned_net: Path,
    history: Sequence[Tensor],
    place: Place,
    dialect: Dialect,
    ranges: Mapping[str, Any] | None = None,
) -> None:
    """Write the solver state ``path``, atomically; a ``.h5`` file as HDF5.

    ``ranges``: as `SettlingRanges.state`.
    """
    own = {STATE_PLACE: json.dumps(asdict(place)).encode()}
    if ranges is not None:
        own[STATE_RANGES] = json.dumps(ranges).encode()
    if path.suffix == hdf5.SUFFIX:
        hdf5.write_state(
            path,
            iteration=iteration,
            current_step=current_step,
            learned_net=str(learned_net),
            history=[array(tensor) for tensor in history],
            own=own,
        )
        return
    head = messages(dialect).SolverState(
        iter=iteration, current_step=current_step, learned_net=str(learned_net)
    )
    parts: list[bytes | memoryview] = [head.SerializeToString()]
    for tensor in history:
        parts += field_parts(STATE_HISTORY, array_parts(array(tensor), dialect))
    for number, content in own.items():
        parts += field_parts(number, [content])
    write_whole(path, parts)


def read_state(path: Path, history: Sequence[Tensor]) -> tuple[int, Path, Place | None]:
    """Fill ``history`` from the solver state ``path``; returns its iteration, its weights and its place.

    The place is None in a state that another Caffe wrote.

    Raises:
        UserError: the file is missing, damaged, or of another network or solver.
    """
    state = stored_state(path)
    if len(state.history) != len(history):
        raise UserError(
            f"{path}: holds {len(state.history)} histories, and this net and solver have {len(history)}: "
            "it is of another network or solver type"
        )
    with mapped(path) as view:
        for number, (blob, tensor) in enumerate(zip(state.history, history, strict=True)):
            values = blob_values(view, blob)
            if values.size != tensor.numel():
                raise UserError(
                    f"{path}: history {number} is of {values.shape}, the blob of {tuple(tensor.shape)}: "
                    "it is of another network"
                )
            put(values, tensor)
    return state.iteration, path.parent / Path(state.learned_net).name, read_place(path)


def read_place(path: Path) -> Place | None:
    """The place that the solver state ``path`` holds; None in one that another Caffe wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        found = _own_field(path, STATE_PLACE)
        return None if found is None else Place(**found)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: its place in the data cannot be read ({error}); use another one") from None


def read_ranges_state(path: Path) -> Any:
    """The ranges that the solver state ``path`` holds, as `SettlingRanges.state`; None where it has none.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return _own_field(path, STATE_RANGES)
    except ValueError as error:
        raise UserError(f"{path}: its ranges cannot be read ({error}); use another one") from None


def _own_field(path: Path, number: int) -> Any:
    """The JSON in a field of our own; None without it."""
    try:
        with mapped(path) as view:
            check_kind(view, path, STATE)
            for field in fields(view):
                if field.number == number and field.wire_type == LENGTH:
                    return parse_json(bytes(view[field.start : field.end]))
    except NotWholeError:
        raise damaged(path, STATE) from None
    return None
