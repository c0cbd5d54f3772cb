"""From an image file to the bytes of a Datum, as Caffe's convert_imageset makes them.

With --encoded --encode_type jpg --resize_height H --resize_width W, convert_imageset (its source and
src/caffe/util/io.cpp of Caffe 1.0) decodes with OpenCV to 8-bit BGR (or grey), resizes with cv::resize
(bilinear), encodes with cv::imencode(".jpg") (quality 95), and sets `data`, `label` and `encoded` of the
Datum, but not channels, height and width. Without --encoded, `data` is channels x height x width values, and
all fields are set. Without a size, a file whose name ends in .jpg or .jpeg is stored as it is.
"""

from __future__ import annotations

import io
import os
import re
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.data.index import Folder, UnreadableImageError
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


JPEG_START = b"\xff\xd8"
PNG_START = b"\x89PNG\r\n\x1a\n"
GIF_STARTS = (b"GIF87a", b"GIF89a")

_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
"""JPEG markers of a frame header, SOF0 to SOF15 (ITU-T T.81, table B.1)."""

_BARE = frozenset({0x01, *range(0xD0, 0xD8)})
"""JPEG markers without a length: TEM, RST0 to RST7."""

MAX_PIXELS = 100_000_000
"""An image with more pixels by its header is not decoded: it takes 300 MB, and is not a photograph."""


class ImageProblem(Enum):
    """Why a file or a record has no image that Caffe can use; the value is the wording."""

    NOT_A_DATUM = "not a Datum message"
    WRONG_COUNT = "values that do not fill the image's size"
    GIF = "a GIF image, which Caffe does not read"
    TOO_LARGE = f"an image of more than {MAX_PIXELS:,} pixels, not decoded"
    UNDECODABLE = "an image that cannot be decoded (cut off, or not an image)"
    NOT_8_BIT = "an image whose pixels are not 8-bit"


class BadImageError(UnreadableImageError):
    """An image that Caffe cannot use: what is wrong, and the particulars of this image."""

    def __init__(self, problem: ImageProblem, particulars: str = "") -> None:
        super().__init__(f"{problem.value}: {particulars}" if particulars else problem.value)
        self.problem = problem


def checked_size(content: bytes) -> tuple[int, int] | None:
    """As `image_size`; raises BadImageError for an image that must not be decoded."""
    if content.startswith(GIF_STARTS):
        raise BadImageError(ImageProblem.GIF)
    size = image_size(content)
    if size is not None and size[0] * size[1] > MAX_PIXELS:
        raise BadImageError(ImageProblem.TOO_LARGE, f"{size[0]} x {size[1]}")
    return size


def image_size(content: bytes) -> tuple[int, int] | None:
    """Width and height in pixels by the header of an image file; None without a known header."""
    if content.startswith(JPEG_START):
        shape = jpeg_shape(content)
        return shape and (shape[2], shape[1])
    if content.startswith(PNG_START):
        return _numbers(content, 16, 4, "big") if content[12:16] == b"IHDR" else None
    if content.startswith(GIF_STARTS):
        return _numbers(content, 6, 2, "little")
    return _size_by_pillow(content)


def jpeg_shape(content: bytes) -> tuple[int, int, int] | None:
    """Channels, height and width by the header of a JPEG file; None where there is none."""
    if not content.startswith(JPEG_START):
        return None
    at, end = len(JPEG_START), len(content)
    while at + 9 < end:
        if content[at] != 0xFF:  # Some writers leave bytes between two segments: decoders look further.
            at = content.find(b"\xff", at)
            if at < 0:
                return None
            continue
        marker = content[at + 1]
        if marker in _FRAMES:
            height, width = content[at + 5] << 8 | content[at + 6], content[at + 7] << 8 | content[at + 8]
            return content[at + 9], height, width
        if marker == 0xFF:  # A fill byte.
            at += 1
        elif marker in _BARE or not marker:
            at += 2
        else:
            at += 2 + (content[at + 2] << 8 | content[at + 3])
    return None


def _numbers(content: bytes, at: int, size: int, order: str) -> tuple[int, int] | None:
    if len(content) < at + 2 * size:
        return None
    first, second = content[at : at + size], content[at + size : at + 2 * size]
    if order == "big":
        return int.from_bytes(first, "big"), int.from_bytes(second, "big")
    return int.from_bytes(first, "little"), int.from_bytes(second, "little")


def _size_by_pillow(content: bytes) -> tuple[int, int] | None:
    """Of the rarer kinds, with a library that reads only their headers."""
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # Only headers are read here, and the caller judges the size.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(content)) as image:
                size: Sequence[int] = image.size
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
            return None
    return size[0], size[1]


LARGE_PIXELS = 25_000_000
"""Images of more pixels are decoded one at a time, to bound the memory."""

REDUCTIONS = (8, 4, 2)
"""Factors by which OpenCV can have libjpeg reduce an image's sides while decoding."""

REDUCED_SHARE = 0.65
"""The share of the stored size that each side must keep when an image is reduced for ``fast``.

Images of 500x375 and 500x333, the usual sizes of ImageNet, are halved for 256x256 (73 % and 65 % of the
height); no factor between a half and one is faster to decode than the whole image.
"""

_JPEG_SCAN = b"\xff\xda"
_JPEG_END = b"\xff\xd9"
_one_large = threading.Lock()


@dataclass(frozen=True)
class ImageForm:
    """The form in which images are stored.

    Attributes:
        width, height: pixels; 0 for each image's own, or where ``shorter`` is set.
        colour: 3 channels, blue, green, red; else 1.
        shorter: the length of the shorter side in pixels, the other following the image's aspect; 0 for none.
        raw: uncompressed pixels, not a JPEG file.
        quality: of the JPEG file, 1 to 100.
        fast: JPEG files are reduced by a power of two while they are decoded, as far as ``REDUCED_SHARE``
            allows.
    """

    width: int
    height: int
    colour: bool = True
    shorter: int = 0
    raw: bool = False
    quality: int = 95
    fast: bool = False

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Width and height at which an image of ``width`` x ``height`` is stored."""
        if self.shorter:
            scale = self.shorter / min(width, height)
            return max(self.shorter, round(width * scale)), max(self.shorter, round(height * scale))
        return self.width or width, self.height or height

    @property
    def text(self) -> str:
        """In words: '256x256 colour'."""
        size = f"{self.width}x{self.height}" if self.width else "original size"
        words = [
            f"shorter side {self.shorter}" if self.shorter else size,
            "colour" if self.colour else "gray",
            *(["raw"] if self.raw else []),
            *([f"JPEG quality {self.quality}"] if self.quality != 95 and not self.raw else []),
            *(["fast"] if self.fast else []),
        ]
        return " ".join(words)


def form_of(text: str) -> ImageForm | None:
    """The form that ``text``, an `ImageForm.text`, describes; None if it does not describe one."""
    found = re.fullmatch(
        r"(?:shorter side (?P<shorter>\d+)|(?P<width>\d+)x(?P<height>\d+)|original size)"
        r" (?P<colour>colour|gray)"
        r"(?P<raw> raw)?(?: JPEG quality (?P<quality>\d+))?(?P<fast> fast)?",
        text,
    )
    if found is None:
        return None
    return ImageForm(
        int(found["width"] or 0),
        int(found["height"] or 0),
        colour=found["colour"] == "colour",
        shorter=int(found["shorter"] or 0),
        raw=bool(found["raw"]),
        quality=int(found["quality"] or 95),
        fast=bool(found["fast"]),
    )


def limit_decoder() -> None:
    """Make OpenCV itself refuse larger images, also those whose header is not known here.

    Takes effect only before OpenCV is imported.
    """
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))


def read_content(path: Path) -> bytes:
    """The bytes of an image file; raises UnreadableImageError."""
    return Folder(Path("/")).read(os.fsencode(path.absolute()), 0, 0)


def image_record(path: bytes, content: bytes, label: int, form: ImageForm) -> bytes:
    """The serialized Datum of an image file, from its name and ``content``.

    Raises:
        UnreadableImageError: it is cut off, too large, or not an image that Caffe's OpenCV can decode.
    """
    pixels = _decoded(content, form)
    if form.raw:
        return _raw_record(pixels, label)
    if not form.width and not form.shorter and form.colour and path.lower().endswith((b".jpg", b".jpeg")):
        return datum_record(content, label)
    return datum_record(_jpeg(pixels, form), label)


def datum_record(jpeg: bytes, label: int) -> bytes:
    """The serialized Datum that holds an encoded image, field for field as convert_imageset sets it."""
    record: bytes = messages(Dialect.BVLC).Datum(data=jpeg, label=label, encoded=True).SerializeToString()
    return record


def _raw_record(pixels: NDArray[np.uint8], label: int) -> bytes:
    import numpy as np

    values = np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))
    channels, height, width = values.shape
    datum = messages(Dialect.BVLC).Datum(
        channels=channels, height=height, width=width, data=values.tobytes(), label=label, encoded=False
    )
    record: bytes = datum.SerializeToString()
    return record


def _jpeg(pixels: NDArray[np.uint8], form: ImageForm) -> bytes:
    import cv2

    quality = () if form.quality == 95 else (cv2.IMWRITE_JPEG_QUALITY, form.quality)
    try:
        _, encoded = cv2.imencode(".jpg", pixels, quality)
    except cv2.error as error:
        raise _opencv_error(error) from None
    content: bytes = encoded.tobytes()
    return content


def _decoded(content: bytes, form: ImageForm) -> Any:
    """The pixels, resized: height x width (x 3, blue first)."""
    import cv2

    if _is_cut_off(content):
        raise UnreadableImageError("the JPEG file is cut off: it has no end marker")
    size = checked_size(content)
    try:
        if size is not None and size[0] * size[1] > LARGE_PIXELS:
            with _one_large:
                return _resized(_pixels(content, size, form), form)
        return _resized(_pixels(content, size, form), form)
    except cv2.error as error:
        raise _opencv_error(error) from None


def _pixels(content: bytes, size: tuple[int, int] | None, form: ImageForm) -> Any:
    import cv2
    import numpy as np

    flag = cv2.IMREAD_COLOR if form.colour else cv2.IMREAD_GRAYSCALE
    if form.fast and size is not None and content.startswith(JPEG_START):
        flag = _reduced_flag(*size, form)
    elif content.startswith(b"RIFF"):
        # Caffe's OpenCV does not look for the orientation in WebP files.
        flag |= cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), flag)
    if pixels is None:
        raise UnreadableImageError("not an image that OpenCV can decode")
    return pixels


def _reduced_flag(width: int, height: int, form: ImageForm) -> int:
    """How to decode a JPEG file at the smallest size that ``REDUCED_SHARE`` of the stored size allows."""
    import cv2

    for factor in REDUCTIONS:
        across, down = -(-width // factor), -(-height // factor)
        # Both ways round, since an orientation in the file may swap the sides.
        if _enough_of((across, down), form.size_of(width, height)) and _enough_of(
            (down, across), form.size_of(height, width)
        ):
            kind = "COLOR" if form.colour else "GRAYSCALE"
            return int(getattr(cv2, f"IMREAD_REDUCED_{kind}_{factor}"))
    return int(cv2.IMREAD_COLOR if form.colour else cv2.IMREAD_GRAYSCALE)


def _enough_of(size: tuple[int, int], wanted: tuple[int, int]) -> bool:
    return size[0] >= REDUCED_SHARE * wanted[0] and size[1] >= REDUCED_SHARE * wanted[1]


def _resized(pixels: Any, form: ImageForm) -> Any:
    import cv2

    height, width = pixels.shape[:2]
    size = form.size_of(width, height)
    return pixels if size == (width, height) and not form.width else cv2.resize(pixels, size)


def _opencv_error(error: Exception) -> UnreadableImageError:
    return UnreadableImageError(f"OpenCV: {' '.join(str(error).split())}")


def _is_cut_off(content: bytes) -> bool:
    """Whether a JPEG file ends inside its pixels, or before them.

    OpenCV (and so convert_imageset) fills the missing part with grey, and the network would be trained on
    half-grey images. No marker can occur within the pixels, so the end marker must come after the start of
    the last scan; an embedded thumbnail comes before that.
    """
    if not content.startswith(JPEG_START) or content.endswith(_JPEG_END):
        return False
    # If both are missing (-1), the file ends before its pixels.
    return content.rfind(_JPEG_END) <= content.rfind(_JPEG_SCAN)
