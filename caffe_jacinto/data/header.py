"""An image's size from its header alone, before anything is decoded."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

JPEG_START = b"\xff\xd8"
PNG_START = b"\x89PNG\r\n\x1a\n"
GIF_STARTS = (b"GIF87a", b"GIF89a")

_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
"""JPEG markers of a frame header, SOF0 to SOF15 (ITU-T T.81, table B.1)."""

_BARE = frozenset({0x01, *range(0xD0, 0xD8)})
"""JPEG markers without a length: TEM, RST0 to RST7."""


def image_size(content: bytes) -> tuple[int, int] | None:
    """Width and height in pixels as the header of an image file says; None where there is no such header."""
    if content.startswith(JPEG_START):
        return _jpeg_size(content)
    if content.startswith(PNG_START):
        return _numbers(content, 16, 4, "big") if content[12:16] == b"IHDR" else None
    if content.startswith(GIF_STARTS):
        return _numbers(content, 6, 2, "little")
    return _size_by_pillow(content)


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
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
            return width, height
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
    """Of the rarer kinds, by a library that reads headers alone."""
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
