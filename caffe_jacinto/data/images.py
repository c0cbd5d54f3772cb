"""Images as the validation network sees them: decoded, resized and cropped, the mean taken off, scaled.

What Caffe's data layers do in the test phase (src/caffe/data_transformer.cpp and layers/data_layer.cpp,
layers/image_data_layer.cpp of Caffe 1.0).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.check import check_folder, check_not_cut_off, parse_datum, record_place
from caffe_jacinto.data.encode import ImageForm, UnreadableImageError, form_of, image_record, read_content
from caffe_jacinto.data.lmdb_writer import MADE_FROM

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Image = NDArray[np.float32]

_JPEG_START = b"\xff\xd8"

Forced = Literal["colour", "grey"]


class Sample(NamedTuple):
    """An image ready for the network, or why it is not."""

    name: str
    label: int | None
    image: Image | None
    """Channels (blue, green, red) x height x width."""

    reason: str = ""


@dataclass(frozen=True)
class Transform:
    """What a data layer makes of an image's pixels in the test phase."""

    channels: int
    height: int
    width: int
    """Of the network's input."""

    crop: bool = True
    """Whether a larger image is cropped to that, in its middle."""

    scale: float = 1.0
    mean_values: tuple[float, ...] = ()
    mean_image: NDArray[np.float32] | None = None
    """Channels x height x width of the uncropped image."""

    forced: Forced | None = None
    """What an encoded image of an LMDB is made; None: it stays what it is."""

    def apply(self, pixels: NDArray[Any]) -> Image:
        """The input made of ``pixels`` (channels x height x width).

        Raises:
            UnreadableImageError: the image does not fit the network's input or the mean image.
        """
        import numpy as np

        channels, height, width = pixels.shape
        fits = height >= self.height and width >= self.width
        same = (height, width) == (self.height, self.width)
        if channels != self.channels or not (fits if self.crop else same):
            why = "" if self.crop or not fits else ", and the validation network crops nothing"
            raise UnreadableImageError(
                f"it is {channels}x{height}x{width}, the network takes "
                f"{self.channels}x{self.height}x{self.width} (channels x height x width){why}"
            )
        top, left = (height - self.height) // 2, (width - self.width) // 2
        window = (slice(None), slice(top, top + self.height), slice(left, left + self.width))
        cropped = pixels[window].astype(np.float32)
        if self.mean_image is not None:
            if self.mean_image.shape != pixels.shape:
                size = "x".join(map(str, self.mean_image.shape))
                raise UnreadableImageError(f"it is {channels}x{height}x{width}, the mean image {size}")
            cropped -= self.mean_image[window]
        elif self.mean_values:
            cropped -= np.asarray(self.mean_values, np.float32).reshape(-1, 1, 1)
        return cropped * np.float32(self.scale) if self.scale != 1 else cropped


def file_samples(paths: list[Path], transform: Transform, form: ImageForm) -> Iterator[Sample]:
    """Image files as they would be in an LMDB of ``form``, one at a time."""
    for path in paths:
        try:
            yield Sample(str(path), None, transform.apply(_file_pixels(path, transform, form)))
        except UnreadableImageError as error:
            yield Sample(str(path), None, None, str(error))


def _file_pixels(path: Path, transform: Transform, form: ImageForm) -> NDArray[Any]:
    """Channels x height x width of an image file, through the record that it would have."""
    record = image_record(os.fsencode(path), read_content(path), 0, form)
    return datum_pixels(parse_datum(str(path), record), transform.forced)


def lmdb_samples(folder: Path, transform: Transform) -> tuple[int, Iterator[Sample]]:
    """The number of records of the LMDB at ``folder``, and the records in key order, one at a time.

    Raises:
        UserError: it is no LMDB, empty or cut off.
    """
    import lmdb

    check_folder(folder)
    try:
        environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=True)
        check_not_cut_off(folder, environment)
    except lmdb.Error as error:
        raise UserError(f"{folder}: not an LMDB that can be read: {error}; make it anew") from error
    entries: int = environment.stat()["entries"]
    if not entries:
        raise UserError(f"LMDB {folder} is empty: make it again")
    return entries, _records(folder, environment, transform)


def _records(folder: Path, environment: Any, transform: Transform) -> Iterator[Sample]:
    import lmdb

    try:
        with environment, environment.begin(buffers=True) as transaction:
            for key, value in transaction.cursor():
                name = bytes(key).decode(errors="replace")
                datum = parse_datum(record_place(folder, bytes(key)), value)
                try:
                    yield Sample(name, datum.label, transform.apply(datum_pixels(datum, transform.forced)))
                except UnreadableImageError as error:
                    yield Sample(name, datum.label, None, str(error))
    except lmdb.Error as error:
        raise UserError(f"{folder} cannot be read as an LMDB ({error}): make it again") from error


def lmdb_file_form(folder: Path) -> ImageForm | None:
    """The form of an LMDB's images: as create_lmdb noted it, or else by the first one; None without any."""
    import lmdb

    with suppress(OSError, ValueError, AttributeError):
        noted = form_of(str(json.loads((folder / MADE_FROM).read_text()).get("form")))
        if noted is not None:
            return noted

    try:
        with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as records:
            for key, value in records.cursor():
                datum = parse_datum(record_place(folder, key), value)
                channels, height, width = datum_pixels(datum, None).shape
                jpeg = datum.encoded and datum.data.startswith(_JPEG_START)
                return ImageForm(width, height, colour=channels == 3, raw=not jpeg)
    except (lmdb.Error, OSError, UserError, UnreadableImageError):
        pass
    return None


def datum_pixels(datum: Any, forced: Forced | None) -> NDArray[Any]:
    """A Datum's image: channels x height x width.

    Raises:
        UnreadableImageError: it holds none.
    """
    import numpy as np

    if datum.encoded:
        return _decoded(datum.data, forced)
    shape = (datum.channels, datum.height, datum.width)
    numbers = np.frombuffer(datum.data, np.uint8) if datum.data else np.asarray(datum.float_data, np.float32)
    if min(shape) < 1 or numbers.size != shape[0] * shape[1] * shape[2]:
        raise UnreadableImageError(f"{numbers.size} numbers for an image of {'x'.join(map(str, shape))}")
    return numbers.reshape(shape)


def _decoded(content: bytes, forced: Forced | None) -> NDArray[Any]:
    """An encoded image as Caffe's data layer decodes it: in its own channels, not turned by its EXIF."""
    import cv2
    import numpy as np

    flags = {None: cv2.IMREAD_UNCHANGED, "colour": cv2.IMREAD_COLOR, "grey": cv2.IMREAD_GRAYSCALE}
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags[forced]) if content else None
    except cv2.error:
        image = None
    if image is None or image.dtype != np.uint8:
        raise UnreadableImageError("not an image that OpenCV can decode to 8-bit pixels")
    return _channels_first(image)


def _channels_first(image: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    planes: NDArray[Any] = np.atleast_3d(image).transpose(2, 0, 1)
    return planes
