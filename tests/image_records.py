"""LMDBs of small images of noise, raw and encoded, and transforms to give to data layers that read them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np

from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages


def write_lmdb(folder: Path, datums: list[Any]) -> Path:
    with lmdb.open(str(folder), map_size=1 << 24) as environment, environment.begin(write=True) as writing:
        for number, datum in enumerate(datums):
            writing.put(b"%08d" % number, datum.SerializeToString())
    return folder


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray[Any, Any]:
    shape = (height, width, channels) if channels > 1 else (height, width)
    small = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return cv2.GaussianBlur(small, (5, 5), 2)


def datum_of(content: bytes | np.ndarray[Any, Any], label: int = 0) -> Any:
    """An encoded image, or raw pixels of height x width x channels."""
    if isinstance(content, bytes):
        return messages(Dialect.BVLC).Datum(data=content, label=label, encoded=True)
    height, width, channels = content.shape
    planes = content.transpose(2, 0, 1).tobytes()
    return messages(Dialect.BVLC).Datum(
        channels=channels, height=height, width=width, data=planes, label=label
    )


def encoded(image: np.ndarray[Any, Any], ending: str) -> bytes:
    return bytes(cv2.imencode(ending, image)[1])


def turned_by_exif(jpeg: bytes) -> bytes:
    """The JPEG with an EXIF segment that asks for a quarter turn (orientation 6)."""
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    body = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


MEAN = "mean.binaryproto"
SETTINGS = [
    # stored as, crop, settings, the deploy network's channels
    ("raw", 20, f'mean_file: "{MEAN}" scale: 0.0078125', 3),
    (".jpg", 21, "mean_value: 104 mean_value: 117 mean_value: 123", 3),
    (".png", 0, "mean_value: 128 scale: 0.5", 3),
    ("turned", 20, "", 3),
    ("grey", 20, "", 1),
    ("grey", 20, "force_color: true mean_value: 3", 3),
    (".jpg", 20, "force_gray: true", 1),
]
