"""The mean image of an LMDB, bit for bit as Caffe's compute_image_mean makes it.

That program adds the images up in the LMDB's order and in 32-bit numbers, and divides by their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.common.errors import RunFailed, UserError
from caffe_jacinto.common.files import check_parent, write_whole
from caffe_jacinto.common.progress import image_progress
from caffe_jacinto.data.check import check_folder, check_not_cut_off, parse_datum, record_place
from caffe_jacinto.data.create import ahead
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Mean:
    """The mean of all images of an LMDB."""

    image: NDArray[np.float32]
    """Channels (blue, green, red) x height x width."""

    images: int
    """Of how many."""


def check_place(output: Path, *, replace: bool) -> None:
    """Raises UserError unless a file may be put at ``output``."""
    check_parent(output)
    if output.exists() and not output.is_file():
        raise UserError(f"{output} exists and is no file: give the name of a file, like mean.binaryproto")
    if output.exists() and not replace:
        raise UserError(f"{output} exists already: --force replaces it")


def write_mean(mean: Mean, output: Path) -> None:
    """Write the mean as a BlobProto, whole or not at all.

    Raises:
        RunFailed: the disk is full or refuses to write.
    """
    channels, height, width = mean.image.shape
    blob = messages(Dialect.BVLC).BlobProto(
        num=1, channels=channels, height=height, width=width, data=mean.image.ravel()
    )
    try:
        write_whole(output, blob.SerializeToString())
    except OSError as error:
        raise RunFailed(f"{output} could not be written: {error.strerror}") from error


def read_mean(path: Path) -> NDArray[np.float32]:
    """The mean image in a ``.binaryproto``: channels (blue, green, red) x height x width.

    Raises:
        UserError: the file cannot be read, or holds no mean image.
    """
    import numpy as np
    from google.protobuf.message import DecodeError

    try:
        blob = messages(Dialect.BVLC).BlobProto.FromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"mean file {path} cannot be read: {error.strerror}") from None
    except DecodeError:
        raise UserError(f"{path} is no mean file: make it with create_lmdb --mean") from None
    dims = (
        tuple(blob.shape.dim)
        if blob.HasField("shape")
        else (blob.num, blob.channels, blob.height, blob.width)
    )
    values = np.array(blob.data, np.float32)
    if len(dims) != 4 or dims[0] != 1 or values.size != math.prod(dims) or not values.size:
        raise UserError(
            f"{path} is no mean file: {values.size} values in the shape {' x '.join(map(str, dims))}; "
            "make it with create_lmdb --mean"
        )
    return values.reshape(dims[1:])


def mean_image(folder: Path, *, workers: int) -> Mean:
    """The mean of all images in the LMDB ``folder``, decoded by ``workers`` threads.

    Raises:
        UserError: no LMDB, an empty or damaged one, a record that is no image, or images of several sizes.
    """
    import lmdb
    import numpy as np

    check_folder(folder)
    try:
        with lmdb.open(str(folder), readonly=True, lock=False) as environment:
            check_not_cut_off(folder, environment)
            entries: int = environment.stat()["entries"]
            if not entries:
                raise UserError(f"LMDB {folder} is empty: make it again")
            total: NDArray[np.float32] | None = None
            with (
                environment.begin(buffers=True) as transaction,
                image_progress(folder.name, entries) as advance,
            ):
                for where, pixels in _images(folder, transaction, workers):
                    if total is None:
                        total = np.zeros(pixels.shape, np.float32)
                    _check_size(where, pixels.shape, total.shape)
                    total += pixels
                    advance()
    except lmdb.Error as error:
        raise UserError(f"{folder} cannot be read as an LMDB ({error}): make it again") from None
    assert total is not None
    return Mean(total / np.float32(entries), entries)


def _check_size(where: str, shape: tuple[int, ...], first: tuple[int, ...]) -> None:
    if shape != first:
        found, wanted = (f"{s[2]}x{s[1]} pixels in {s[0]} channel{'s' * (s[0] != 1)}" for s in (shape, first))
        raise UserError(
            f"{where}: the image has {found}, and the first one {wanted}: a mean needs one size; "
            "make the LMDB again with --size"
        )


def _images(folder: Path, transaction: Any, workers: int) -> Iterator[tuple[str, NDArray[Any]]]:
    """Each record and its pixels, channels x height x width, in the LMDB's order."""

    def records() -> Iterator[tuple[str, bytes]]:
        with transaction.cursor() as cursor:
            for key, value in cursor:
                yield record_place(folder, bytes(key)), bytes(value)

    return ahead(lambda record: (record[0], _pixels(*record)), records(), workers)


def _pixels(where: str, record: bytes) -> NDArray[Any]:
    """An image's values, channels x height x width, as Caffe's data layer has them.

    Raises:
        UserError: the record is no Datum, or its image cannot be decoded.
    """
    import numpy as np

    datum = parse_datum(where, record)
    if datum.encoded:
        return _decoded(where, datum.data)
    shape = (datum.channels, datum.height, datum.width)
    values: NDArray[Any] = (
        np.frombuffer(datum.data, np.uint8) if datum.data else np.array(datum.float_data, np.float32)
    )
    if min(shape) < 1 or values.size != shape[0] * shape[1] * shape[2]:
        raise UserError(
            f"{where}: {values.size} values, where channels x height x width are"
            f" {' x '.join(map(str, shape))}: make the LMDB again"
        )
    return values.reshape(shape)


def _decoded(where: str, image: bytes) -> NDArray[Any]:
    import cv2
    import numpy as np

    try:
        pixels = cv2.imdecode(np.frombuffer(image, dtype=np.uint8), cv2.IMREAD_UNCHANGED) if image else None
    except cv2.error:
        pixels = None
    if pixels is None or pixels.dtype != np.uint8:
        raise UserError(f"{where}: the image cannot be decoded to 8-bit pixels: make the LMDB again")
    channels_first: NDArray[Any] = np.atleast_3d(pixels).transpose(2, 0, 1)
    return channels_first
