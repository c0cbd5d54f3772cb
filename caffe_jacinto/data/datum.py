"""From a record to a network's input: Datum -> pixels -> crop, mirror, mean and scale, as Caffe does it.

Follows src/caffe/data_transformer.cpp and src/caffe/layers/data_layer.cpp of Caffe 1.0. Arrays are channels
(blue, green, red) x height x width.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.processes import keep_freed_memory
from caffe_jacinto.data.encode import BadImageError, ImageProblem, checked_size
from caffe_jacinto.data.index import UnreadableImageError
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[Any]
else:
    Pixels = Any

IN_FLIGHT_PER_WORKER = 16
"""Images in work or waiting for an earlier one, for each thread: bounds the memory."""

CHUNK = 4
"""Images that a thread takes at a time: one by one would cost some percent of decoding them."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def parse_datum(record: bytes) -> Any:
    """The Datum message in a record's bytes; raises BadImageError."""
    from google.protobuf.message import DecodeError

    try:
        return messages(Dialect.BVLC).Datum.FromString(record)
    except DecodeError:
        raise BadImageError(ImageProblem.NOT_A_DATUM) from None


def datum_pixels(datum: Any, colour: bool | None = None) -> Pixels:
    """A Datum's image as Caffe's data layer sees it: 8-bit, or float32 where the Datum holds floats.

    Args:
        colour: decode an encoded image to three channels (True) or to one (False); None: as it is stored.

    Raises:
        BadImageError: there is no such image in it.
    """
    pixels = stored_pixels(datum, colour)
    if datum.encoded:
        check_depth(pixels)
    return pixels


def stored_pixels(datum: Any, colour: bool | None = None) -> Pixels:
    """As `datum_pixels`, with an encoded image in its own depth, which may be one that Caffe refuses."""
    import numpy as np

    if datum.encoded:
        return decoded(datum.data, colour)
    shape = (datum.channels, datum.height, datum.width)
    values: Pixels = (
        np.frombuffer(datum.data, np.uint8) if datum.data else np.asarray(datum.float_data, np.float32)
    )
    if min(shape) < 1 or values.size != math.prod(shape):
        sides = " x ".join(map(str, shape))
        raise BadImageError(
            ImageProblem.WRONG_COUNT, f"{values.size} for {sides} (channels x height x width)"
        )
    return values.reshape(shape)


def check_depth(pixels: Pixels) -> None:
    """Raise BadImageError for decoded pixels that are not 8-bit."""
    if pixels.dtype != "uint8":
        raise BadImageError(ImageProblem.NOT_8_BIT, str(pixels.dtype))


def decoded(content: bytes, colour: bool | None = None) -> Pixels:
    """The pixels of an image file: channels (blue, green, red) x height x width, 8-bit; not turned.

    ``colour``: True for three channels, False for one; None: as the file has them.

    Raises:
        BadImageError: it cannot be decoded, or is too large.
    """
    import cv2
    import numpy as np

    checked_size(content)
    # IMREAD_UNCHANGED does not turn the image by its EXIF orientation; nor does Caffe.
    flag = {None: cv2.IMREAD_UNCHANGED, True: cv2.IMREAD_COLOR, False: cv2.IMREAD_GRAYSCALE}[colour]
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flag) if content else None
    except cv2.error:
        image = None
    if image is None:
        raise BadImageError(ImageProblem.UNDECODABLE)
    channels_first: Pixels = np.atleast_3d(image).transpose(2, 0, 1)
    return channels_first


def read_record(where: str, record: bytes, colour: bool | None = None) -> tuple[Any, Pixels]:
    """The Datum in a record and its pixels; ``where`` names the record in messages.

    Raises:
        UserError: it holds no usable image.
    """
    try:
        datum = parse_datum(record)
        return datum, datum_pixels(datum, colour)
    except BadImageError as error:
        raise UserError(f"{where}: {error}: make the LMDB again") from None


class Window(NamedTuple):
    """The part of an image that goes into a batch, and whether it is mirrored left to right."""

    top: int
    left: int
    mirrored: bool = False


@dataclass(frozen=True)
class Transform:
    """What a data layer does to an image's pixels (its ``transform_param``)."""

    crop: int = 0
    """Side of the square that is cut out, in pixels; 0 for the whole image."""

    mirror: bool = False
    scale: float = 1.0
    mean_values: tuple[float, ...] = ()
    """One for all channels, or one for each."""

    mean_image: NDArray[np.float32] | None = None
    """Of the size of the uncropped images."""

    colour: bool | None = None
    """What encoded images are decoded to; see `datum_pixels`."""

    def window(
        self, height: int, width: int, chance: Sequence[float] | None = None, *, anywhere: bool = False
    ) -> Window:
        """The window of an image of this size, which must not be smaller than the crop.

        Args:
            chance: three random numbers from 0 to below 1, for the place (top, left) and for mirroring;
                without them nothing is mirrored.
            anywhere: whether ``chance`` places the crop, as in training; else it lies in the middle.
        """
        mirrored = self.mirror and chance is not None and bool(chance[2] < 0.5)
        if not self.crop:
            return Window(0, 0, mirrored)
        down, across = height - self.crop, width - self.crop
        if chance is None or not anywhere:
            return Window(down // 2, across // 2, mirrored)
        return Window(int(chance[0] * (down + 1)), int(chance[1] * (across + 1)), mirrored)

    def cut(self, pixels: Pixels, window: Window) -> Pixels:
        """``window`` of an image or mean image, mirrored if the window is; a view in the same type."""
        if self.crop:
            pixels = pixels[:, window.top : window.top + self.crop, window.left : window.left + self.crop]
        return pixels[:, :, ::-1] if window.mirrored else pixels

    def mean_for(self, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
        """What is subtracted from whole images of ``shape``, or None.

        It is the mean image, to be cut as the image is, or one value a channel (channels x 1 x 1).

        Raises:
            UnreadableImageError: the mean does not fit the shape.
        """
        import numpy as np

        if self.mean_image is not None:
            if self.mean_image.shape != shape:
                raise UnreadableImageError(
                    f"the mean image is {_sizes(self.mean_image.shape)}, and the image {_sizes(shape)}"
                    " (channels x height x width)"
                )
            return self.mean_image
        if len(self.mean_values) not in (0, 1, shape[0]):
            raise UnreadableImageError(
                f"{len(self.mean_values)} mean values for {shape[0]} channels: give one, or one for each"
            )
        if not any(self.mean_values):
            return None
        return np.asarray(self.mean_values, np.float32).reshape(-1, 1, 1)

    def apply(self, pixels: Pixels, window: Window) -> NDArray[np.float32]:
        """The network's input for ``window`` of an image: (pixel - mean) * scale.

        Raises:
            UnreadableImageError: the mean does not fit the image.
        """
        import numpy as np

        mean = self.mean_for(pixels.shape)
        result: NDArray[np.float32] = self.cut(pixels, window).astype(np.float32)
        if mean is not None:
            result -= mean if self.mean_image is None else self.cut(mean, window)
        if self.scale != 1:
            result *= np.float32(self.scale)
        return result


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def ahead(job: Callable[[_Item], _Result], items: Iterable[_Item], workers: int) -> Iterator[_Result]:
    """``job`` of each of ``items``, in order, computed ahead by ``workers`` threads.

    Threads, not processes: OpenCV releases Python's lock while it decodes, resizes and encodes, which takes
    nearly all of the time, and images need not be copied between processes.
    """
    import cv2

    cv2.setNumThreads(1)  # One thread an image: images are worked on in parallel.
    keep_freed_memory()

    def work(chunk: Sequence[_Item]) -> list[_Result]:
        return [job(item) for item in chunk]

    waiting: deque[Future[list[_Result]]] = deque()
    remaining = iter(items)
    pool = ThreadPoolExecutor(workers)
    try:
        while chunk := tuple(islice(remaining, CHUNK)):
            waiting.append(pool.submit(work, chunk))
            if len(waiting) * CHUNK >= workers * IN_FLIGHT_PER_WORKER:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
