"""One image file -> the bytes of one Datum, as Caffe's convert_imageset makes them.

What convert_imageset does with --encoded --encode_type jpg --resize_height H --resize_width W (read in
tools/convert_imageset.cpp and src/caffe/util/io.cpp of Caffe 1.0): decode with OpenCV to 8-bit BGR (or
grey), cv::resize with its default (bilinear), cv::imencode(".jpg") with its default quality (95), and a
Datum in which `data`, `label` and `encoded` are set, and channels, height and width are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_JPEG_START = b"\xff\xd8"
_JPEG_SCAN = b"\xff\xda"
_JPEG_END = b"\xff\xd9"


class UnreadableImageError(Exception):
    """An image file that cannot be used; the text is the reason."""


@dataclass(frozen=True)
class ImageForm:
    """The form in which images are stored: size in pixels, and colour (3 channels) or grey (1)."""

    width: int
    height: int
    colour: bool = True


def encode_image(path: Path, form: ImageForm) -> bytes:
    """The image at ``path``, resized, as the bytes of a JPEG file.

    Raises UnreadableImageError for a file that is missing, empty, cut off, or no image OpenCV knows.
    """
    import cv2

    image = read_image(path, colour=form.colour)
    try:
        _, encoded = cv2.imencode(".jpg", cv2.resize(image, (form.width, form.height)))
    except cv2.error as error:
        raise UnreadableImageError(f"OpenCV: {' '.join(str(error).split())}") from None
    return encoded.tobytes()


def read_image(path: Path, *, colour: bool) -> NDArray[np.uint8]:
    """The pixels of an image file: height x width x 3 (blue, green, red), or height x width where grey.

    Raises UnreadableImageError as `encode_image`.
    """
    import cv2
    import numpy as np

    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from None
    except ValueError as error:  # A path that no file can have: it holds a null character.
        raise UnreadableImageError(str(error)) from None
    if not content:
        raise UnreadableImageError("the file is empty")
    if _is_cut_off(content):
        raise UnreadableImageError("the JPEG file is cut off: it has no end marker")
    try:
        flag = cv2.IMREAD_COLOR if colour else cv2.IMREAD_GRAYSCALE
        image: Any = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), flag)
    except cv2.error as error:
        raise UnreadableImageError(f"OpenCV: {' '.join(str(error).split())}") from None
    if image is None:
        raise UnreadableImageError("not an image that OpenCV can decode")
    pixels: NDArray[np.uint8] = image
    return pixels


def datum_record(jpeg: bytes, label: int) -> bytes:
    """The serialized Datum that holds an encoded image, field for field as convert_imageset sets it."""
    record: bytes = messages(Dialect.BVLC).Datum(data=jpeg, label=label, encoded=True).SerializeToString()
    return record


def _is_cut_off(content: bytes) -> bool:
    """Whether a JPEG file ends inside its pixels.

    OpenCV (and so convert_imageset) fills the missing part with grey and goes on, which would train the
    network on half-grey images. Within the pixels a marker cannot occur, so the end marker must come after
    the last scan's beginning; an embedded thumbnail comes before it.
    """
    return content.startswith(_JPEG_START) and content.rfind(_JPEG_END) < content.rfind(_JPEG_SCAN)
