"""Snapshots of a training: ``.caffemodel`` and ``.solverstate`` as Caffe has them, to go on from exactly.

The solver state is Caffe's message, which stock Caffe reads, too. Behind it stands one field more, which
protobuf passes over: the seed, and how many images the training has seen, from which order, crops, mirroring
and dropout follow.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from caffe_jacinto.caffemodel.blobs import mapped, stored_state
from caffe_jacinto.caffemodel.net_file import array_parts, field_parts
from caffe_jacinto.caffemodel.weights import blob_values
from caffe_jacinto.caffemodel.wire import LENGTH, NotWholeError, fields
from caffe_jacinto.engines.torch.weight_file import array, put
from caffe_jacinto.errors import UserError
from caffe_jacinto.files import write_whole
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

_HISTORY = 3
"""SolverState.history."""

_PLACE = 20_000
"""The field of our own, far from Caffe's numbers and below protobuf's reserved ones."""


@dataclass(frozen=True)
class Place:
    """Where the training is in its data."""

    seed: int
    images: int
    """Seen so far, by all ranks together."""

    dialect: str | None = None
    """Of the files it was trained from, if said: the same blobs mean something else in the other."""


def write_state(
    path: Path,
    *,
    iteration: int,
    current_step: int,
    learned_net: Path,
    history: Sequence[Tensor],
    place: Place,
    dialect: Dialect,
) -> None:
    """Write the solver state ``path``, whole or not at all."""
    head = messages(dialect).SolverState(
        iter=iteration, current_step=current_step, learned_net=str(learned_net)
    )
    parts: list[bytes | memoryview] = [head.SerializeToString()]
    for tensor in history:
        parts += field_parts(_HISTORY, array_parts(array(tensor), dialect))
    parts += field_parts(_PLACE, [json.dumps(asdict(place)).encode()])
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
        with mapped(path) as view:
            for field in fields(view):
                if field.number == _PLACE and field.wire_type == LENGTH:
                    return Place(**json.loads(bytes(view[field.start : field.end])))
    except (NotWholeError, ValueError, TypeError) as error:
        raise UserError(f"{path}: its place in the data cannot be read ({error}); take another one") from None
    return None
