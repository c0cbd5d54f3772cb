"""Protobuf's wire format, in which Caffe's binary files are, and the numbers of their fields."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from caffe_jacinto.prototxt.dialects import Dialect

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]

Part = bytes | memoryview

NET_NAME, NET_LAYER, NET_V1_LAYER = 1, 100, 2
LAYER_BLOBS, BLOB_DATA, BLOB_DIFF = 7, 5, 6
"""Field numbers, the same in both dialects: NetParameter's name, layer and layers (the V1 form),
LayerParameter's blobs, BlobProto's data and diff."""

STATE_ITER, STATE_NET, STATE_HISTORY = 1, 2, 3
"""SolverState's iter, learned_net and history."""

STATE_PLACE, STATE_RANGES = 20_000, 20_001
"""Fields of our own in solver states, above Caffe's numbers and below protobuf's reserved ones: the place in
the data, and the ranges of activations of quantization-aware training."""

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {FIXED64: 8, FIXED32: 4}


class NotWholeError(ValueError):
    """The bytes end in the middle of a field, or are not a protobuf message."""


class Field(NamedTuple):
    """One field of a message."""

    number: int
    wire_type: int
    value: int
    """A varint's value; 0 for the other types."""

    start: int
    """Where the content of the other types begins and ends in the buffer."""

    end: int


def varint(buffer: memoryview, position: int, end: int) -> tuple[int, int]:
    """The varint at ``position``, and the position after it."""
    value = shift = 0
    while position < end and shift < 70:
        byte = buffer[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise NotWholeError


def fields(buffer: memoryview, start: int = 0, end: int | None = None) -> Iterator[Field]:
    """The fields of the message in ``buffer[start:end]``, in the order of the file.

    Raises:
        NotWholeError: a field reaches beyond ``end``, or the bytes are not a field.
    """
    stop = len(buffer) if end is None else end
    position = start
    while position < stop:
        tag, position = varint(buffer, position, stop)
        number, wire_type = tag >> 3, tag & 7
        value = 0
        begin = position
        if wire_type == VARINT:
            value, position = varint(buffer, position, stop)
        elif wire_type == LENGTH:
            size, begin = varint(buffer, position, stop)
            position = begin + size
        elif wire_type in _FIXED_BYTES:
            position = begin + _FIXED_BYTES[wire_type]
        else:
            raise NotWholeError
        if position > stop or number == 0:
            raise NotWholeError
        yield Field(number, wire_type, value, begin, position)


def integers(buffer: memoryview, field: Field) -> list[int]:
    """The integers of one occurrence of a repeated field, packed or not."""
    if field.wire_type == VARINT:
        return [field.value]
    values = []
    position = field.start
    while position < field.end:
        value, position = varint(buffer, position, field.end)
        values.append(value)
    return values


def text(buffer: memoryview, field: Field) -> str:
    """A string field."""
    return bytes(buffer[field.start : field.end]).decode(errors="replace")


def array_parts(values: Values, dialect: Dialect = Dialect.BVLC, *, diff: Values | None = None) -> list[Part]:
    """A BlobProto of an array and its ``diff``, if there is one; they are not copied."""
    parts: list[Part] = [shape_bytes(values.shape, dialect), *field_parts(BLOB_DATA, [_packed(values)])]
    return parts if diff is None else [*parts, *field_parts(BLOB_DIFF, [_packed(diff)])]


def _packed(values: Values) -> memoryview:
    import numpy as np

    return np.ascontiguousarray(values, "<f4").reshape(-1).data.cast("B")


def shape_bytes(shape: Sequence[int], dialect: Dialect) -> bytes:
    """The shape of a BlobProto."""
    from caffe_jacinto.prototxt.schema import messages

    blob = messages(dialect).BlobProto()
    blob.shape.SetInParent()
    blob.shape.dim.extend(shape)
    return bytes(blob.SerializeToString())


def field_parts(number: int, content: Sequence[Part]) -> list[Part]:
    """A field of bytes in protobuf's wire format."""
    return [_encoded(number << 3 | LENGTH) + _encoded(sum(len(part) for part in content)), *content]


def _encoded(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
