"""A ``.caffemodel`` of either dialect, layer by layer: what each layer is, and where its numbers lie.

Numbers are read when they are asked for, one blob at a time, and written from where they lie: a file of any
size is read, changed and written in little memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.caffemodel.storage import (
    LENGTH,
    Blob,
    NotWholeError,
    blob_values,
    blobs_field,
    fields,
    layer_in,
    mapped,
    stored_layers,
)
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]


Part = bytes | memoryview

_NET_NAME, _NET_LAYER, _NET_V1_LAYER = 1, 100, 2
_LAYER_BLOBS, _BLOB_DATA = 7, 5
"""Field numbers, the same in both dialects: NetParameter's name, layer and layers (the V1 form),
LayerParameter's blobs, BlobProto's data."""

_V1_TYPES = {4: "Convolution", 14: "InnerProduct", 15: "LRN", 17: "Pooling", 18: "ReLU", 20: "Softmax"}
"""V1LayerParameter.LayerType of the layers that matter to weights, by number."""

_MOST_HEADER_BYTES = 1 << 20
"""A layer without its numbers is far smaller; what is larger is no layer of Caffe's."""


@dataclass
class NetLayer:
    """A layer of a weight file."""

    name: str
    header: Any
    """Its LayerParameter message in the file's dialect, without blobs."""

    blobs: list[Blob]
    view: memoryview
    """The file's bytes, which the blobs lie in; they are there as long as `open_net` holds the file open."""

    def values(self, index: int) -> Values:
        """The numbers of a blob, a copy in its shape."""
        return blob_values(self.view, self.blobs[index])

    @property
    def type(self) -> str:
        return str(self.header.type)


@dataclass(frozen=True)
class NewLayer:
    """A layer to be written."""

    header: Any
    """A LayerParameter message, without blobs."""

    blobs: Sequence[Values | tuple[memoryview, Blob]]
    """Arrays, or blobs of a file, which are copied as they stand."""


@contextmanager
def open_net(path: Path, dialect: Dialect) -> Iterator[tuple[str, list[NetLayer]]]:
    """The network's name and all its layers, those without blobs too.

    Raises:
        UserError: the file is missing, cut off, or no weight file of the dialect.
    """
    with mapped(path) as view:
        name = ""
        layers: list[NetLayer] = []
        try:
            for item in fields(view):
                if item.number == _NET_NAME and item.wire_type == LENGTH:
                    name = bytes(view[item.start : min(item.end, item.start + 1000)]).decode(errors="replace")
                layer = layer_in(view, item)
                if layer is not None:
                    header = _header(view, item.start, item.end, dialect, v1=item.number == _NET_V1_LAYER)
                    layers.append(NetLayer(layer.name, header, list(layer.blobs), view))
        except NotWholeError:
            size = f"{path.stat().st_size:,} bytes"
            raise UserError(
                f"{path}: cut off or no weight file (.caffemodel) ({size}); take another one"
            ) from None
        if not any(layer.blobs for layer in layers):
            raise UserError(f"{path}: no layer with weights in it; is it a .caffemodel?")
        yield name, layers


def _header(view: memoryview, start: int, end: int, dialect: Dialect, *, v1: bool) -> Any:
    """The layer's message without its blobs; of the V1 form, its name, type, bottoms and tops."""
    from google.protobuf.message import DecodeError

    parts = []
    number = blobs_field(v1=v1)
    position = start
    for item in fields(view, start, end):
        if item.number != number:
            parts.append(bytes(view[position : item.end]))
        position = item.end
    content = b"".join(parts)
    if len(content) > _MOST_HEADER_BYTES:
        raise NotWholeError
    schema = messages(dialect).NetParameter()
    try:
        if not v1:
            header = schema.layer.add()
            header.ParseFromString(content)
            return header
        old = schema.layers.add()
        old.ParseFromString(content)
    except DecodeError:
        raise NotWholeError from None
    header = schema.layer.add(name=old.name, type=_V1_TYPES.get(old.type, f"V1 type {old.type}"))
    header.bottom.extend(old.bottom)
    header.top.extend(old.top)
    for parameters in ("convolution_param", "inner_product_param"):
        if old.HasField(parameters):
            getattr(header, parameters).CopyFrom(getattr(old, parameters))
    return header


def write_net(path: Path, name: str, layers: Iterable[NewLayer], dialect: Dialect) -> None:
    """Write a weight file of ``dialect``, layer by layer, whole or not at all."""
    write_whole(path, net_parts(name, layers, dialect))


def net_parts(name: str, layers: Iterable[NewLayer], dialect: Dialect) -> Iterator[Part]:
    """The bytes of a weight file of ``dialect``, in pieces."""
    yield messages(dialect).NetParameter(name=name).SerializeToString()
    for layer in layers:
        content: list[Part] = [layer.header.SerializeToString()]
        for blob in layer.blobs:
            content += field_parts(_LAYER_BLOBS, _blob_parts(blob, dialect))
        yield from field_parts(_NET_LAYER, content)


def _blob_parts(blob: Values | tuple[memoryview, Blob], dialect: Dialect) -> list[Part]:
    if isinstance(blob, tuple):
        view, stored = blob
        if stored.number_format == "<f4":
            data: list[Part] = [view[start:end] for start, end in stored.ranges]
            return [_shape_bytes(stored.shape, dialect), *field_parts(_BLOB_DATA, data)]
        blob = blob_values(view, stored)
    return array_parts(blob, dialect)


def array_parts(values: Values, dialect: Dialect = Dialect.BVLC) -> list[Part]:
    """A BlobProto of an array, its numbers where they lie."""
    import numpy as np

    flat = np.ascontiguousarray(values, "<f4").reshape(-1)
    return [_shape_bytes(values.shape, dialect), *field_parts(_BLOB_DATA, [flat.data.cast("B")])]


def _shape_bytes(shape: Sequence[int], dialect: Dialect) -> bytes:
    blob = messages(dialect).BlobProto()
    blob.shape.SetInParent()
    blob.shape.dim.extend(shape)
    return bytes(blob.SerializeToString())


def field_parts(number: int, content: Sequence[Part]) -> list[Part]:
    """A field of bytes in protobuf's wire format."""
    return [_varint(number << 3 | LENGTH) + _varint(sum(len(part) for part in content)), *content]


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the leading 1s of the old form, which always has four axes."""
    kept = list(shape)
    while len(kept) > 1 and kept[0] == 1:
        kept.pop(0)
    return tuple(kept)


def find_dialect(path: Path) -> Dialect:
    """The dialect that a weight file is of, by its batch norm; stock Caffe's where it has none.

    Raises:
        UserError: the file cannot be read.
    """
    with open_net(path, Dialect.BVLC) as (_, layers):
        norms = [len(layer.blobs) for layer in layers if layer.type == "BatchNorm"]
        return Dialect.CAFFE_JACINTO if 5 in norms else Dialect.BVLC


def without_layers(weights: Path, names: Collection[str]) -> bytes:
    """The bytes of ``weights`` but for the layers ``names``; all others stay as they are, in their order.

    Raises:
        UserError: the file is missing, cut off or no weight file.
    """
    with mapped(weights) as view:
        stored_layers(view, weights)
        kept = BytesIO()
        position = 0
        for field in fields(view):
            layer = layer_in(view, field)
            if layer is None or layer.name not in names:
                kept.write(view[position : field.end])
            position = field.end
        return kept.getvalue()
