"""A ``.caffemodel`` of either dialect, layer by layer: its settings, and where its numbers are stored.

Numbers are read when they are asked for, one blob at a time, and written straight from the file that they are
in: a file of any size is read, changed and written in little memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.caffemodel.hdf5 import is_hdf5
from caffe_jacinto.caffemodel.storage import (
    V0_BLOBS,
    V1_BLOBS,
    V1_V0_LAYER,
    Blob,
    blob_values,
    damaged,
    layer_fields,
    mapped,
)
from caffe_jacinto.caffemodel.wire import (
    BLOB_DATA,
    LAYER_BLOBS,
    LENGTH,
    NET_LAYER,
    NET_NAME,
    NET_V1_LAYER,
    Field,
    NotWholeError,
    Part,
    array_parts,
    field_parts,
    fields,
    shape_bytes,
    text,
)
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.netspec.graph import shared_blobs
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages
from caffe_jacinto.prototxt.upgrade import upgrade_net

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]


_NET_INPUTS = (3, 4, 8)
"""NetParameter's input, input_dim and input_shape."""

_MOST_HEADER_BYTES = 1 << 20
"""A layer without its numbers is far smaller; anything larger is not a layer."""


@dataclass
class NetLayer:
    """A layer of a weight file."""

    name: str
    header: Any
    """Its LayerParameter message in the file's dialect, without blobs."""

    blobs: list[Blob]
    view: memoryview
    """The file's bytes, in which the blobs are; valid as long as `open_net` holds the file open."""

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
    """Arrays, or blobs of a file, which are copied as they are."""

    diffs: Sequence[Values] = ()
    """The last update of each blob, where the file shall have it; then ``blobs`` are arrays."""


@contextmanager
def open_net(
    path: Path, dialect: Dialect, network: Any | None = None
) -> Iterator[tuple[str, list[NetLayer]]]:
    """The network's name and all its layers in today's form, those without blobs included.

    An HDF5 file has the names and the blobs of layers only: with ``network``, a NetParameter message, they
    are that one's layers, in its order; without, only batch norms have a type.

    Raises:
        UserError: the file is missing, cut off, or not a weight file of the dialect.
    """
    with mapped(path) as view:
        found = list(layer_fields(view, path))
        try:
            if any(field.number == NET_V1_LAYER for field, _ in found):
                headers = _upgraded_headers(view, path, [field for field, _ in found], dialect)
                blobs = {layer.name: layer.blobs for _, layer in found if layer.blobs}
                layers = [
                    NetLayer(header.name, header, list(blobs.get(header.name, ())), view)
                    for header in headers
                ]
            else:
                layers = [
                    NetLayer(layer.name, _header(view, field, dialect), list(layer.blobs), view)
                    for field, layer in found
                ]
        except NotWholeError:
            raise damaged(path) from None
        if network is not None and is_hdf5(path):
            yield network.name, _layers_of(network, layers)
        else:
            yield _net_name(view), layers


def require_types(path: Path, layers: Iterable[NetLayer]) -> None:
    """Raise UserError where the types of the layers are not known, in an HDF5 file without its network."""
    if is_hdf5(path) and any(layer.blobs and not layer.type for layer in layers):
        raise UserError(
            f"{path}: an HDF5 file does not say the types of its layers; give its network: --network FILE"
        )


def _layers_of(network: Any, stored: Iterable[NetLayer]) -> list[NetLayer]:
    """The layers of ``network`` with the stored blobs, then stored ones that it lacks."""
    left = {layer.name: layer for layer in stored}
    blobs = {name: list(layer.blobs) for name, layer in left.items()}
    for name, shared in shared_blobs(network).items():
        own = blobs.setdefault(name, [])
        for index, (owner, at) in sorted(shared.items()):
            if (
                at < len(blobs.get(owner, ()))
                and index <= len(own)
                and not any(blob.ranges for blob in own[index : index + 1])
            ):
                own[index : index + 1] = [blobs[owner][at]]
    view = next((layer.view for layer in left.values()), memoryview(b""))
    found: dict[str, NetLayer] = {}
    for message in network.layer:
        header = type(message)()
        header.CopyFrom(message)
        header.ClearField("blobs")
        left.pop(header.name, None)
        found.setdefault(header.name, NetLayer(header.name, header, blobs.get(header.name, []), view))
    return [*found.values(), *(layer for layer in left.values() if layer.blobs)]


def is_old(path: Path) -> bool:
    """Whether a weight file has layers of the V0 or V1 form.

    Raises:
        UserError: the file is missing, cut off or not a weight file.
    """
    with mapped(path) as view:
        return any(field.number == NET_V1_LAYER for field, _ in layer_fields(view, path))


def _net_name(view: memoryview) -> str:
    names = [field for field in fields(view) if field.number == NET_NAME and field.wire_type == LENGTH]
    return text(view, names[-1]._replace(end=min(names[-1].end, names[-1].start + 1000))) if names else ""


def _upgraded_headers(view: memoryview, path: Path, old: list[Field], dialect: Dialect) -> list[Any]:
    """The layers' messages without blobs, of a file with V0 or V1 layers; Caffe's Split layers stay."""
    net = messages(dialect).NetParameter()
    position = 0
    for field in fields(view):
        if field.number in _NET_INPUTS:
            _parse_into(net, bytes(view[position : field.end]))
        position = field.end
    for field in old:
        parts = _without_blobs(view, field, V1_BLOBS if field.number == NET_V1_LAYER else LAYER_BLOBS)
        _parse_into(net, _tagged(field.number, b"".join(parts)))
    upgrade_net(net, str(path))
    return list(net.layer)


def _header(view: memoryview, field: Field, dialect: Dialect) -> Any:
    """The layer's message without its blobs."""
    parts = _without_blobs(view, field, LAYER_BLOBS)
    return _without_foreign_fields(messages(dialect).NetParameter().layer.add(), parts)


def _without_blobs(view: memoryview, field: Field, number: int) -> list[bytes]:
    """The bytes of each field of a layer, but for its blobs, the fields ``number``.

    Raises:
        NotWholeError: they are longer than a layer's settings can be.
    """
    parts: list[bytes] = []
    position, size = field.start, 0
    for item in fields(view, field.start, field.end):
        if item.number == V1_V0_LAYER and item.wire_type == LENGTH and number == V1_BLOBS:
            parts.append(_tagged(V1_V0_LAYER, b"".join(_without_blobs(view, item, V0_BLOBS))))
        elif item.number != number:
            size += item.end - position
            if size > _MOST_HEADER_BYTES:
                raise NotWholeError
            parts.append(bytes(view[position : item.end]))
        position = item.end
    return parts


def _tagged(number: int, content: Part) -> bytes:
    return b"".join(field_parts(number, [content]))


def _parse_into(message: Any, content: bytes) -> None:
    """Merge serialized fields into ``message``.

    Raises:
        NotWholeError: they are not of its kind.
    """
    from google.protobuf.message import DecodeError

    try:
        message.MergeFromString(content)
    except DecodeError:
        raise NotWholeError from None


def _without_foreign_fields(header: Any, parts: Sequence[bytes]) -> Any:
    """``header``, filled from the bytes of each of its fields.

    Forks give their parameters numbers that mean something else here: what does not parse is one of them.
    """
    from google.protobuf.message import DecodeError

    for part in parts:
        field = type(header)()
        try:
            field.ParseFromString(part)
        except DecodeError:
            continue
        header.MergeFrom(field)
    return header


def write_net(path: Path, name: str, layers: Iterable[NewLayer], dialect: Dialect) -> None:
    """Write a weight file of ``dialect``, layer by layer, whole or not at all."""
    write_whole(path, net_parts(name, layers, dialect))


def net_parts(name: str, layers: Iterable[NewLayer], dialect: Dialect) -> Iterator[Part]:
    """The bytes of a weight file of ``dialect``, in pieces."""
    yield messages(dialect).NetParameter(name=name).SerializeToString()
    for layer in layers:
        content: list[Part] = [layer.header.SerializeToString()]
        for blob, diff in zip_longest(layer.blobs, layer.diffs):
            content += field_parts(LAYER_BLOBS, _blob_parts(blob, dialect, diff))
        yield from field_parts(NET_LAYER, content)


def _blob_parts(blob: Values | tuple[memoryview, Blob], dialect: Dialect, diff: Values | None) -> list[Part]:
    if isinstance(blob, tuple):
        view, stored = blob
        if stored.number_format == "<f4":
            data: list[Part] = [view[start:end] for start, end in stored.ranges]
            shape = _old_shape_bytes if stored.four_axes else shape_bytes
            return [shape(stored.shape, dialect), *field_parts(BLOB_DATA, data)]
        blob = blob_values(view, stored)
    return array_parts(blob, dialect, diff=diff)


def _old_shape_bytes(shape: Sequence[int], dialect: Dialect) -> bytes:
    """The shape in the old form, in which leading axes of 1 may be missing axes; Caffe reads both."""
    num, channels, height, width = shape
    blob = messages(dialect).BlobProto(num=num, channels=channels, height=height, width=width)
    return bytes(blob.SerializeToString())


def find_dialect(path: Path) -> Dialect:
    """The dialect of a weight file, by its batch norms; stock Caffe's where it has none.

    Raises:
        UserError: the file cannot be read.
    """
    with open_net(path, Dialect.BVLC) as (_, layers):
        norms = [len(layer.blobs) for layer in layers if layer.type == "BatchNorm"]
        return Dialect.CAFFE_JACINTO if 5 in norms else Dialect.BVLC


def without_layers(weights: Path, names: Collection[str]) -> bytes:
    """The bytes of ``weights`` without the layers ``names``; the rest stays as it is, in its order.

    Raises:
        UserError: the file is missing, cut off or not a weight file.
    """
    with mapped(weights) as view:
        dropped = {field.start for field, layer in layer_fields(view, weights) if layer.name in names}
        kept = BytesIO()
        position = 0
        for field in fields(view):
            if field.start not in dropped:
                kept.write(view[position : field.end])
            position = field.end
        return kept.getvalue()
