"""The mean image of an LMDB, bit for bit as Caffe's compute_image_mean computes it.

That program sums the images in the LMDB's order in 32-bit numbers, and divides by their number.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.common.errors import RunFailed, UserError
from caffe_jacinto.common.files import check_parent, write_whole
from caffe_jacinto.common.text import count_of, duration, image_progress
from caffe_jacinto.data.datum import ahead, read_record
from caffe_jacinto.data.lmdb_reader import LmdbReader
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
    """The number of them."""


def make_mean(folder: Path, output: Path, *, workers: int, replace: bool, keep: bool) -> None:
    """Write the mean image of the LMDB ``folder`` to ``output``; prints what it is.

    Args:
        replace: whether a file that exists may be replaced.
        keep: whether a file that exists is kept, and nothing is done.

    Raises:
        UserError: the mean cannot be made of this LMDB, or not be written to ``output``.
        RunFailed: the disk is full or refuses to write.
    """
    if keep and output.is_file():
        print(f"{output}: kept (--force makes it again)")
        return
    check_parent(output)
    if output.exists() and not output.is_file():
        raise UserError(f"{output} exists and is not a file: give a file name, like mean.binaryproto")
    if output.exists() and not replace:
        raise UserError(f"{output} exists already: --force replaces it")
    start = time.monotonic()
    mean = mean_image(folder, workers=workers)
    write_mean(mean, output)
    channels, height, width = mean.image.shape
    print(
        f"{output}: mean of {count_of(mean.images, 'image')}, {width}x{height},"
        f" {count_of(channels, 'channel')} with means"
        f" {', '.join(f'{value:.2f}' for value in mean.image.mean(axis=(1, 2), dtype=float))},"
        f" in {duration(time.monotonic() - start)}"
    )


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
    dims, values = read_blob(path, "mean file", "make it with create_lmdb --mean")
    if len(dims) != 4 or dims[0] != 1 or values.size != math.prod(dims) or not values.size:
        raise UserError(
            f"{path} is not a mean file: {values.size} values in the shape {' x '.join(map(str, dims))}; "
            "make it with create_lmdb --mean"
        )
    return values.reshape(dims[1:])


def read_blob(path: Path, kind: str, remedy: str) -> tuple[tuple[int, ...], NDArray[np.float32]]:
    """The shape that a ``.binaryproto`` gives, and its numbers along one axis, which need not fill the shape.

    Raises:
        UserError: the file cannot be read, or is none; ``kind`` and ``remedy`` say what it should be.
    """
    import numpy as np
    from google.protobuf.message import DecodeError

    try:
        blob = messages(Dialect.BVLC).BlobProto.FromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"{kind} {path} cannot be read: {error.strerror}") from None
    except DecodeError:
        raise UserError(f"{path} is not a {kind}: {remedy}") from None
    dims = (
        tuple(blob.shape.dim)
        if blob.HasField("shape")
        else (blob.num, blob.channels, blob.height, blob.width)
    )
    return dims, np.array(blob.data, np.float32)


def mean_image(folder: Path, *, workers: int) -> Mean:
    """The mean of all images in the LMDB ``folder``, decoded by ``workers`` threads.

    Raises:
        UserError: the LMDB cannot be read, a record holds no image, or the images have several sizes.
    """
    import numpy as np

    total: NDArray[np.float32] | None = None
    with LmdbReader(folder) as reader, image_progress(folder.name, len(reader)) as advance:
        named = ((reader.place(key), record) for key, record in reader.records())
        for where, pixels in ahead(lambda item: (item[0], read_record(*item)[1]), named, workers):
            if total is None:
                total = np.zeros(pixels.shape, np.float32)
            _check_size(where, pixels.shape, total.shape)
            total += pixels
            advance()
    assert total is not None  # An LMDB without records is not opened.
    return Mean(total / np.float32(len(reader)), len(reader))


def _check_size(where: str, shape: tuple[int, ...], first: tuple[int, ...]) -> None:
    if shape != first:
        found, wanted = (f"{s[2]}x{s[1]} pixels in {count_of(s[0], 'channel')}" for s in (shape, first))
        raise UserError(
            f"{where}: the image has {found}, and the first one {wanted}: a mean needs images of one size;"
            " make the LMDB again with --size"
        )
