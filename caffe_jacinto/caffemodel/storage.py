"""What ``.caffemodel`` and ``.solverstate`` files hold: layers, blobs, values.

Files are mapped, and the numbers of a blob read when they are asked for: large files take little memory. HDF5
files are read as the binary form that Caffe would have written, in memory.
"""

from __future__ import annotations

import codecs
import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.caffemodel import hdf5
from caffe_jacinto.caffemodel.wire import (
    BLOB_DATA,
    LAYER_BLOBS,
    LENGTH,
    NET_LAYER,
    NET_NAME,
    NET_V1_LAYER,
    STATE_HISTORY,
    STATE_ITER,
    STATE_NET,
    VARINT,
    Field,
    NotWholeError,
    fields,
    integers,
    text,
)
from caffe_jacinto.common.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


WEIGHTS, STATE = "weight file (.caffemodel)", "solver state (.solverstate)"
"""What messages call the two kinds of files."""

_LAYER_NAME = 1
_V1_NAME, V1_BLOBS = 4, 6
V1_V0_LAYER, V0_BLOBS = 1, 50
_V0_NAME = 1
"""V1LayerParameter's field for a layer of the V0 form, and that layer's fields."""

_SHAPE, _DOUBLE_DATA, _RAW_TYPE, _RAW_DATA = 7, 8, 10, 12
_FIRST_FIELDS = ((STATE_ITER, VARINT), (NET_NAME, LENGTH), (NET_LAYER, LENGTH))

_MOST_SHAPE_BYTES = 400
"""More than a shape of Caffe's at most 32 axes takes."""

_RAW_FORMATS = {0: ("<f8", 8), 1: ("<f4", 4), 2: ("<f2", 2)}
"""The fork's ``Type``: DOUBLE, FLOAT, FLOAT16."""


@dataclass(frozen=True)
class Blob:
    """One blob in a file: its shape, and where and how its numbers are stored."""

    shape: tuple[int, ...]
    number_format: str
    """As a numpy dtype: ``<f4``, ``<f8``, ``<f2``."""

    ranges: tuple[tuple[int, int], ...]
    """The byte ranges of the numbers, in order: one, or several where a writer did not pack them."""

    four_axes: bool
    """Stored in the old form: num, channels, height, width. A blob of fewer axes has 1 in the first ones."""


@dataclass(frozen=True)
class StoredLayer:
    """A layer of a weight file."""

    name: str
    blobs: tuple[Blob, ...]


@dataclass(frozen=True)
class StoredState:
    """A ``.solverstate``: the iteration, the weight file that it belongs to, the blobs of the history."""

    iteration: int
    learned_net: str
    history: tuple[Blob, ...]


@contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """The bytes of ``path``, mapped; of an HDF5 file, Caffe's binary form.

    Raises:
        UserError: it cannot be read, is empty, or is an HDF5 file that Caffe has not written.
    """
    if hdf5.is_hdf5(path):
        yield memoryview(hdf5.binary_form(path))
        return
    try:
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        view = memoryview(pages)
        try:
            yield view
        finally:
            # An error on its way out may still hold a part of the view; that is unmapped with the error.
            with suppress(BufferError):
                view.release()
                pages.close()
    except ValueError as error:
        if path.stat().st_size:
            raise
        raise UserError(f"{path}: the file is empty; it was not written whole") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def layer_fields(view: memoryview, path: Path) -> Iterator[tuple[Field, StoredLayer]]:
    """Each layer of the weight file in ``view``, those without blobs included, and the field that holds it.

    Raises:
        UserError: the file is cut off or not a weight file, or a blob's numbers do not fill its shape.
    """
    has_blobs = False
    check_kind(view, path, WEIGHTS)
    try:
        for field in fields(view):
            layer = _layer_in(view, field)
            if layer is not None:
                has_blobs = has_blobs or bool(layer.blobs)
                yield field, layer
    except NotWholeError:
        raise damaged(path) from None
    if not has_blobs:
        raise UserError(f"{path}: no layer with weights in it; is it a .caffemodel?")


def stored_layers(view: memoryview, path: Path) -> list[StoredLayer]:
    """The layers with blobs of the weight file in ``view``, in order; as `layer_fields`."""
    return [layer for _, layer in layer_fields(view, path) if layer.blobs]


def stored_state(path: Path) -> StoredState:
    """The contents of the ``.solverstate`` at ``path``.

    Raises:
        UserError: the file is cut off or not a solver state.
    """
    iteration, learned_net, history = None, "", []
    try:
        with mapped(path) as view:
            check_kind(view, path, STATE)
            for field in fields(view):
                if field.number == STATE_ITER and field.wire_type == VARINT:
                    iteration = field.value
                elif field.number == STATE_NET and field.wire_type == LENGTH:
                    learned_net = text(view, field)
                elif field.number == STATE_HISTORY and field.wire_type == LENGTH:
                    history.append(_blob(view, field))
    except NotWholeError:
        raise damaged(path, STATE) from None
    if iteration is None or not history:
        raise UserError(f"{path}: no iteration or no history in it; is it a .solverstate?")
    return StoredState(iteration, learned_net, tuple(history))


def damaged(path: Path, kind: str = WEIGHTS) -> UserError:
    """The error to raise for a file whose bytes are not a whole ``kind``."""
    return UserError(f"{path}: cut off or not a {kind} ({path.stat().st_size:,} bytes); use another one")


def check_kind(view: memoryview, path: Path, wanted: str) -> None:
    """Raise UserError where the file in ``view`` begins as one of another kind than ``wanted`` does."""
    start = bytes(view[:1024])
    if _is_text(start):
        raise UserError(f"{path}: text, such as a prototxt; give a {wanted}")
    with suppress(NotWholeError, StopIteration):
        first = next(fields(view))
        # A solver state begins with its iteration, a network with its name.
        found = STATE if first.wire_type == VARINT else WEIGHTS
        if found != wanted and (first.number, first.wire_type) in _FIRST_FIELDS:
            raise UserError(f"{path}: a {found}; give a {wanted}")


def is_text_file(path: Path) -> bool:
    """Whether a file begins as text.

    Raises:
        UserError: it cannot be read.
    """
    with mapped(path) as view:
        return _is_text(bytes(view[:1024]))


def _is_text(start: bytes) -> bool:
    """Whether a file that begins with ``start`` is text: UTF-8 without control characters."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # the last character may be cut off
    except UnicodeDecodeError:
        return False
    return len(text) > 8 and all(char.isprintable() or char in "\t\n\r\f" for char in text)


def _layer_in(view: memoryview, field: Field) -> StoredLayer | None:
    """The layer that a field of a NetParameter holds, in any form; None where it holds something else."""
    if field.wire_type != LENGTH or field.number not in (NET_LAYER, NET_V1_LAYER):
        return None
    if field.number == NET_LAYER:
        return _named_blobs(view, field, _LAYER_NAME, LAYER_BLOBS)
    for inner in fields(view, field.start, field.end):
        if inner.number == V1_V0_LAYER and inner.wire_type == LENGTH:
            return _named_blobs(view, inner, _V0_NAME, V0_BLOBS)
    return _named_blobs(view, field, _V1_NAME, V1_BLOBS)


def _named_blobs(view: memoryview, field: Field, name_number: int, blobs_number: int) -> StoredLayer:
    name, blobs = "", []
    for inner in fields(view, field.start, field.end):
        if inner.wire_type != LENGTH:
            continue
        if inner.number == name_number:
            name = text(view, inner)
        elif inner.number == blobs_number:
            blobs.append(_blob(view, inner))
    return StoredLayer(name, tuple(blobs))


def _blob(view: memoryview, field: Field) -> Blob:
    old_shape = [0, 0, 0, 0]
    shape: list[int] | None = None
    number_format, size = "<f4", 4
    raw_type = 1
    ranges: list[tuple[int, int]] = []
    for inner in fields(view, field.start, field.end):
        if 1 <= inner.number <= 4 and inner.wire_type == VARINT:
            old_shape[inner.number - 1] = inner.value
        elif inner.number == _SHAPE and inner.wire_type == LENGTH:
            if inner.end - inner.start > _MOST_SHAPE_BYTES:
                raise NotWholeError
            shape = [
                dim
                for part in fields(view, inner.start, inner.end)
                if part.number == 1
                for dim in integers(view, part)
            ]
        elif inner.number in (BLOB_DATA, _DOUBLE_DATA, _RAW_DATA):
            ranges.append((inner.start, inner.end))
            if inner.number == _DOUBLE_DATA:
                number_format, size = "<f8", 8
            elif inner.number == _RAW_DATA:
                number_format = "raw"
        elif inner.number == _RAW_TYPE:
            raw_type = inner.value
    if number_format == "raw":
        if raw_type not in _RAW_FORMATS:
            raise NotWholeError
        number_format, size = _RAW_FORMATS[raw_type]
    if shape is None and ranges and not any(old_shape):
        shape = []  # one number, without axes: Caffe then writes no shape
    dims = tuple(old_shape if shape is None else shape)
    if sum(end - start for start, end in ranges) != prod(dims) * size:
        raise NotWholeError
    return Blob(dims, number_format, tuple(ranges), four_axes=shape is None)


def read_weights(path: Path) -> dict[str, list[NDArray[np.float32]]]:
    """The blobs of each layer that has any, by the layer's name, in the file's order.

    Arrays are copies in the shapes of the file. Both forms of a blob's shape are read, and the fork's raw and
    half-precision numbers.

    Raises:
        UserError: the file is missing, cut off or not a weight file.
    """
    with mapped(path) as view:
        return {
            layer.name: [blob_values(view, blob) for blob in layer.blobs]
            for layer in stored_layers(view, path)
        }


def blob_values(view: memoryview, blob: Blob) -> NDArray[np.float32]:
    """The numbers of ``blob`` in the file's bytes ``view``."""
    import numpy as np

    stored = np.dtype(blob.number_format)
    parts = [
        np.frombuffer(view, stored, (end - start) // stored.itemsize, start).astype(np.float32)
        for start, end in blob.ranges
    ]
    flat = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.float32), *parts])
    return flat.reshape(blob.shape)
