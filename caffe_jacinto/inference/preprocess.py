"""Images as the validation network sees them: resized as by create_lmdb, cropped, mean taken off, scaled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from caffe_jacinto.data.check import check_folder, check_not_cut_off, parse_datum, record_place
from caffe_jacinto.data.encode import ImageForm, UnreadableImageError, encode_image
from caffe_jacinto.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Image = NDArray[np.float32]


class Sample(NamedTuple):
    """An image ready for the network, or why it is not."""

    name: str
    label: int | None
    image: Image | None
    """Channels (blue, green, red) x height x width."""

    reason: str = ""


@dataclass(frozen=True)
class Transform:
    """What a test-phase data layer does to an image (Caffe's DataTransformer)."""

    channels: int
    height: int
    width: int
    """Of the network's input, which is the crop."""

    scale: float = 1.0
    mean_values: tuple[float, ...] = ()
    mean_image: Any = None
    """Channels x height x width of the uncropped image, or None."""

    def apply(self, pixels: NDArray[Any]) -> Image:
        """The input made of ``pixels`` (channels x height x width).

        Raises:
            UnreadableImageError: the image is smaller than the crop, or of other channels or another size
                than the mean image.
        """
        import numpy as np

        channels, height, width = pixels.shape
        if channels != self.channels or height < self.height or width < self.width:
            raise UnreadableImageError(
                f"it is {channels}x{height}x{width}; "
                f"the network takes {self.channels}x{self.height}x{self.width}"
            )
        top, left = (height - self.height) // 2, (width - self.width) // 2
        window = (slice(None), slice(top, top + self.height), slice(left, left + self.width))
        cropped = pixels[window].astype(np.float32)
        if self.mean_image is not None:
            if self.mean_image.shape != pixels.shape:
                size = "x".join(map(str, self.mean_image.shape))
                raise UnreadableImageError(
                    f"it is {channels}x{height}x{width}, the mean image {size}; give --resize"
                )
            cropped -= self.mean_image[window]
        elif self.mean_values:
            cropped -= np.asarray(self.mean_values, np.float32).reshape(-1, 1, 1)
        return cropped * np.float32(self.scale) if self.scale != 1 else cropped


def file_samples(paths: list[Path], transform: Transform, size: tuple[int, int]) -> Iterator[Sample]:
    """Image files, stored as create_lmdb stores them (a JPEG of ``size``: width, height) and read again."""
    form = ImageForm(*size, colour=transform.channels == 3)
    for path in paths:
        try:
            yield Sample(str(path), None, transform.apply(_decoded(encode_image(path, form), form.colour)))
        except UnreadableImageError as error:
            yield Sample(str(path), None, None, str(error))


def lmdb_samples(folder: Path, transform: Transform) -> tuple[int, Iterator[Sample]]:
    """The number of records of the LMDB at ``folder``, and the records in key order, one at a time.

    Raises:
        UserError: it is no LMDB, or cut off.
    """
    import lmdb

    check_folder(folder)
    try:
        environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=True)
        check_not_cut_off(folder, environment)
    except lmdb.Error as error:
        raise UserError(f"{folder}: not an LMDB that can be read: {error}; make it anew") from error
    return environment.stat()["entries"], _records(folder, environment, transform)


def _records(folder: Path, environment: Any, transform: Transform) -> Iterator[Sample]:
    with environment, environment.begin(buffers=True) as transaction:
        for key, value in transaction.cursor():
            name = bytes(key).decode(errors="replace")
            datum = parse_datum(record_place(folder, bytes(key)), value)
            try:
                yield Sample(name, datum.label, transform.apply(datum_pixels(datum, transform.channels)))
            except UnreadableImageError as error:
                yield Sample(name, datum.label, None, str(error))


def lmdb_image_size(folder: Path) -> tuple[int, int] | None:
    """Width and height of the first image of an LMDB; None where there is none to read."""
    import lmdb

    try:
        with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as records:
            for _, value in records.cursor():
                datum = parse_datum(str(folder), value)
                height, width = datum_pixels(datum, datum.channels or 3).shape[1:]
                return width, height
    except (lmdb.Error, OSError, UnreadableImageError):
        pass
    return None


def datum_pixels(datum: Any, channels: int) -> NDArray[Any]:
    """A Datum's image: channels x height x width."""
    import numpy as np

    if datum.encoded:
        return _decoded(datum.data, channels == 3)
    shape = (datum.channels, datum.height, datum.width)
    numbers = np.frombuffer(datum.data, np.uint8) if datum.data else np.asarray(datum.float_data, np.float32)
    if numbers.size != np.prod(shape):
        raise UnreadableImageError(f"{numbers.size} numbers for an image of {'x'.join(map(str, shape))}")
    return numbers.reshape(shape)


def _decoded(content: bytes, colour: bool) -> NDArray[Any]:
    import cv2
    import numpy as np

    try:
        flag = cv2.IMREAD_COLOR if colour else cv2.IMREAD_GRAYSCALE
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flag)
    except cv2.error:
        image = None
    if image is None:
        raise UnreadableImageError("not an image that OpenCV can decode")
    return image.transpose(2, 0, 1) if colour else image[None]
