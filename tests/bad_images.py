"""The kinds of odd and bad image files that ImageNet and other collections hold, made the same each time.

`ODD` are files that a decoder reads, each with a trap in it; `BAD` are those that must be left out, with
the reason. All have names that end in .JPEG, as in ImageNet, whatever is in them.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT = 60, 40


class OddImage(NamedTuple):
    """A file that can be read, and the width and height that it is read with."""

    content: bytes
    width: int = WIDTH
    height: int = HEIGHT


class BadImage(NamedTuple):
    """A file that cannot be used, and a part of the reason to be given."""

    content: bytes
    reason: str


def photograph(width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """Smooth colours, height x width x 3, no two corners alike: a turned image is seen to be turned."""
    noise = np.random.default_rng(11).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.uint8)


def encoded(pixels: NDArray[np.uint8] | NDArray[np.uint16], suffix: str = ".jpg", *options: int) -> bytes:
    """The image as the content of a file."""
    content: bytes = cv2.imencode(suffix, pixels, options)[1].tobytes()
    return content


def pillow_encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """What OpenCV does not write: CMYK, palettes, animations."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def cmyk_jpeg() -> bytes:
    """Four channels, for printing, with Adobe's marker and so inverted."""
    pixels = np.dstack([photograph(), photograph()[::-1, :, 0]])
    return pillow_encoded(Image.frombytes("CMYK", (WIDTH, HEIGHT), pixels.tobytes()), "JPEG")


def animated_gif() -> bytes:
    """Two frames."""
    frames = [Image.fromarray(photograph()), Image.fromarray(photograph()[::-1].copy())]
    return pillow_encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def turned_jpeg(orientation: int, order: str = "<") -> bytes:
    """A JPEG file whose EXIF segment says how to turn it: 6 for a quarter to the right, as phones write.

    EXIF 2.3, 4.6.2: a TIFF header and one directory, with one entry: tag 0x0112, a short.
    """
    start = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    tiff = start + struct.pack(order + "IH", 8, 1) + entry + struct.pack(order + "I", 0)
    segment = b"Exif\0\0" + tiff
    jpeg = encoded(photograph())
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(segment)) + segment + jpeg[2:]


def thumbnail_jpeg() -> bytes:
    """A JPEG file with another, whole one in an application segment, end marker and all."""
    small = b"Exif\0\0" + encoded(photograph(12, 8))
    jpeg = encoded(photograph())
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(small)) + small + jpeg[2:]


def claiming_jpeg(width: int, height: int) -> bytes:
    """A small JPEG file whose frame header states another size."""
    jpeg = encoded(photograph())
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def claiming_png(width: int, height: int) -> bytes:
    """A small PNG file whose header, with a right checksum, states another size."""
    png = encoded(photograph(), ".png")
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def claiming_bmp(width: int, height: int) -> bytes:
    """A BMP file that ends after a header that states a size."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def _odd() -> dict[str, OddImage]:
    colours = photograph()
    grey = cv2.cvtColor(colours, cv2.COLOR_BGR2GRAY).astype(np.uint8)
    alpha = np.dstack([colours, grey])
    jpeg = encoded(colours)
    return {
        "alpha": OddImage(encoded(alpha, ".png")),
        "bytes after the end": OddImage(jpeg + b"\0" * 100),
        "cmyk": OddImage(cmyk_jpeg()),
        "grey": OddImage(encoded(grey)),
        "grey png": OddImage(encoded(grey, ".png")),
        "mirrored": OddImage(turned_jpeg(2)),
        "one pixel": OddImage(encoded(colours[:1, :1]), 1, 1),
        "one row": OddImage(encoded(colours[:1]), WIDTH, 1),
        "palette": OddImage(pillow_encoded(Image.fromarray(colours).quantize(16), "PNG")),
        "png": OddImage(encoded(colours, ".png")),
        "progressive": OddImage(encoded(colours, ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)),
        "restart markers": OddImage(encoded(colours, ".jpg", cv2.IMWRITE_JPEG_RST_INTERVAL, 2)),
        "sixteen bits": OddImage(encoded(colours.astype(np.uint16) * 257, ".png")),
        "thumbnail": OddImage(thumbnail_jpeg()),
        "turned": OddImage(turned_jpeg(6), HEIGHT, WIDTH),
        "turned, big-endian": OddImage(turned_jpeg(8, ">"), HEIGHT, WIDTH),
        "upside down": OddImage(turned_jpeg(3)),
    }


def _bad() -> dict[str, BadImage]:
    jpeg = encoded(photograph())
    progressive = encoded(photograph(), ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    thumbnail = thumbnail_jpeg()
    return {
        "claims to be huge": BadImage(
            claiming_jpeg(20_000, 20_000), "more than 100,000,000 pixels, not decoded: 20000 x 20000"
        ),
        "claims to be huge, bmp": BadImage(
            claiming_bmp(20_000, 20_000), "more than 100,000,000 pixels, not decoded: 20000 x 20000"
        ),
        "claims to be huge, png": BadImage(
            claiming_png(20_000, 20_000), "more than 100,000,000 pixels, not decoded: 20000 x 20000"
        ),
        "claims to be just too large": BadImage(
            claiming_png(100_000_001, 1), "more than 100,000,000 pixels, not decoded: 100000001 x 1"
        ),
        "cut off": BadImage(jpeg[: len(jpeg) * 3 // 4], "cut off"),
        "cut off after a thumbnail": BadImage(thumbnail[:-20], "cut off"),
        "cut off in its header": BadImage(jpeg[:100], "cut off"),
        "cut off, progressive": BadImage(progressive[: len(progressive) // 2], "cut off"),
        "empty": BadImage(b"", "empty"),
        "gif": BadImage(animated_gif(), "GIF"),
        "only a start marker": BadImage(b"\xff\xd8", "cut off"),
        "web page": BadImage(b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not an image"),
        "zeros": BadImage(bytes(5000), "not an image"),
    }


ODD = _odd()
BAD = _bad()
