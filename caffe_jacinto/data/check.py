"""Is this LMDB fit to train or test with? Answered in well under a second, before a long run starts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import looked_for
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

FIRST_LABELS = 500
"""Labels read from the beginning, to see whether the images come class by class."""

ENOUGH_FOR_ORDER = 20
"""With fewer records, labels in ascending order may be chance."""

_NUMBERED_KEY = re.compile(rb"([0-9]{8})_")


@dataclass(frozen=True)
class LmdbFacts:
    """What a look into an LMDB of images found.

    Attributes:
        images: records, all of them (counted by LMDB itself).
        channels: of the sampled images.
        height, width: pixels, the smallest of the sampled images.
        highest_label: of the records whose label was read.
        sampled: images that were decoded, evenly spaced from the first to the last where the keys are
            numbered as convert_imageset numbers them, else from both ends.
        notes: what is allowed and yet probably a mistake, one sentence each, to be shown as warnings.
    """

    images: int
    channels: int
    height: int
    width: int
    highest_label: int
    sampled: int
    notes: tuple[str, ...] = ()


class _Shape(NamedTuple):
    """Of one image, as Caffe's data layer will see it."""

    channels: int
    height: int
    width: int


def check_lmdb(
    path: str,
    *,
    num_classes: int | None,
    min_images: int,
    min_size: int,
    sample: int = 64,
    training: bool = False,
    channels: int = 3,
) -> LmdbFacts:
    """Look into an LMDB and return what it holds, if Caffe can train or test a network with it.

    Every label of a large LMDB cannot be read in a second: ``sample`` images are decoded, and besides them
    the labels of the first 500 records are read. The LMDB is opened read-only and without its lock, so a
    Caffe that reads it at the same time is not disturbed.

    Args:
        path: the LMDB's folder.
        num_classes: labels must be below it; None where it is not known.
        min_images: records there must be at least (those of one batch).
        min_size: pixels that each side of an image must have at least (the crop).
        sample: images to decode.
        training: whether the order matters, so that images that come class by class are worth a note.
        channels: of the network's input.

    Raises UserError when the LMDB is missing, is none, is damaged or cut off, holds no or too few records,
    or when a record is no Datum with an image of ``channels`` and enough pixels, or has a label that is
    not below ``num_classes``.
    """
    import lmdb

    folder = Path(path)
    check_folder(folder)
    shapes: list[_Shape] = []
    labels: list[int] = []
    try:
        with lmdb.open(path, readonly=True, lock=False) as environment:
            check_not_cut_off(folder, environment)
            entries: int = environment.stat()["entries"]
            _check_enough(folder, entries, min_images, training=training)
            with environment.begin(buffers=True) as transaction:
                for key, value in _first_records(transaction, FIRST_LABELS):
                    datum = parse_datum(record_place(folder, key), value)
                    _check_label(record_place(folder, key), datum.label, num_classes)
                    labels.append(datum.label)
                first_labels = list(labels)
                for key, value in _spread_records(transaction, entries, sample):
                    where = record_place(folder, key)
                    datum = parse_datum(where, value)
                    _check_label(where, datum.label, num_classes)
                    labels.append(datum.label)
                    shapes.append(_shape(where, datum))
                    _check_shape(where, shapes[-1], channels, min_size)
    except lmdb.Error as error:
        raise UserError(f"{folder} cannot be read as an LMDB ({error}): make it again") from None
    return LmdbFacts(
        images=entries,
        channels=channels,
        height=min(shape.height for shape in shapes),
        width=min(shape.width for shape in shapes),
        highest_label=max(labels),
        sampled=len(shapes),
        notes=(_order_notes(folder, first_labels, labels) if training else ()) + _lock_notes(folder),
    )


def is_lmdb_folder(path: Path) -> bool:
    """Whether ``path`` is a folder with an LMDB's data file in it (and nothing is said of its content)."""
    return (path / "data.mdb").is_file()


def check_folder(folder: Path) -> None:
    """Raises UserError unless ``folder`` is an LMDB's, which this user may read."""
    if not folder.exists():
        raise UserError(
            f"LMDB {folder} does not exist{looked_for(folder)}: make it with python -m"
            " caffe_jacinto.create_lmdb"
        )
    if folder.is_file():
        hint = f": give its folder, {folder.parent}" if folder.name == "data.mdb" else ""
        raise UserError(f"{folder} is a file, and an LMDB is a folder{hint}")
    if (folder / "CURRENT").is_file() and not is_lmdb_folder(folder):
        raise UserError(f"{folder} is a LevelDB, and an LMDB is needed: make one from the images")
    if not is_lmdb_folder(folder):
        raise UserError(f"{folder} is not an LMDB: there is no data.mdb in it")
    if not os.access(folder / "data.mdb", os.R_OK):
        raise UserError(f"LMDB {folder} cannot be read: no permission for {folder / 'data.mdb'}")


def check_not_cut_off(folder: Path, environment: Any) -> None:
    """Raises UserError for an LMDB that lacks its end.

    Reading a page beyond the file's end would kill this process, and Caffe, with a bus error.
    """
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    actual = (folder / "data.mdb").stat().st_size
    if actual < needed:
        raise UserError(
            f"LMDB {folder} is cut off: data.mdb has {actual:,} bytes of {needed:,}; copy or make it again"
        )


def _check_enough(folder: Path, entries: int, min_images: int, *, training: bool) -> None:
    if entries == 0:
        raise UserError(f"LMDB {folder} is empty: make it again")
    if entries < min_images:
        raise UserError(
            f"LMDB {folder} holds {entries:,} images, and one batch alone needs {min_images:,}:"
            f" add images, or lower training.{'batch_size' if training else 'val_batch_size'}"
        )


def _check_label(where: str, label: int, num_classes: int | None) -> None:
    if label < 0:
        raise UserError(f"{where}: label {label} is below 0: make the LMDB again")
    if num_classes is not None and label >= num_classes:
        raise UserError(
            f"{where}: label {label}, but the network has {num_classes} classes (labels 0 to"
            f" {num_classes - 1}): set the number of classes, or make the LMDB with labels from 0"
        )


def _check_shape(where: str, shape: _Shape, channels: int, min_size: int) -> None:
    if shape.channels != channels:
        raise UserError(
            f"{where}: the image has {shape.channels} channel{'s' * (shape.channels != 1)}, and the network"
            f" takes {channels}: make the LMDB again{' in colour' * (channels == 3)}"
        )
    if min(shape.height, shape.width) < min_size:
        raise UserError(
            f"{where}: the image is {shape.width}x{shape.height} pixels, smaller than the crop of"
            f" {min_size}x{min_size}: make the LMDB with larger images, or crop less"
        )


def _order_notes(folder: Path, first_labels: list[int], labels: list[int]) -> tuple[str, ...]:
    in_order = len(first_labels) >= ENOUGH_FOR_ORDER and first_labels == sorted(first_labels)
    if not in_order or len(set(labels)) == 1:
        return ()
    return (
        f"LMDB {folder} holds its images class by class, and Caffe reads them in that order: training on"
        " batches of one class fails; make the LMDB again, shuffled",
    )


def _lock_notes(folder: Path) -> tuple[str, ...]:
    """Caffe opens even to read with LMDB's lock file, unless it was built with ALLOW_LMDB_NOLOCK."""
    lock = folder / "lock.mdb"
    read_only_disk = os.statvfs(folder).f_flag & os.ST_RDONLY  # There LMDB does without the lock file.
    if read_only_disk or os.access(lock if lock.exists() else folder, os.W_OK):
        return ()
    return (
        f"Caffe writes {lock} when it opens this LMDB, and you may not: it may stop with 'Permission denied';"
        " give yourself write permission, or copy the LMDB",
    )


def _first_records(transaction: Any, count: int) -> Iterator[tuple[bytes, Any]]:
    with transaction.cursor() as cursor:
        for _, (key, value) in zip(range(count), cursor, strict=False):
            yield bytes(key), value


def _spread_records(transaction: Any, entries: int, sample: int) -> Iterator[tuple[bytes, Any]]:
    """About ``sample`` records: evenly spaced by the numbers in the keys, else from both ends."""
    with transaction.cursor() as cursor:
        cursor.first()
        first = _NUMBERED_KEY.match(bytes(cursor.key()))
        cursor.last()
        last = _NUMBERED_KEY.match(bytes(cursor.key()))
        if entries <= sample or first is None or last is None:
            half = (sample + 1) // 2
            yield from _first_records(transaction, half)
            cursor.last()
            rest = range(min(sample, entries) - half)
            for _, (key, value) in zip(rest, cursor.iterprev(), strict=False):
                yield bytes(key), value
            return
        low, high = int(first[1]), int(last[1])
        before = b""
        for step in range(sample):
            number = low + (high - low) * step // max(sample - 1, 1)
            # Numbers are missing where an image was left out: take the next one there is.
            if cursor.set_range(b"%08d_" % number) and bytes(cursor.key()) != before:
                before = bytes(cursor.key())
                yield before, cursor.value()


def parse_datum(where: str, value: Any) -> Any:
    """A record as a Datum message.

    Raises:
        UserError: it is none.
    """
    from google.protobuf.message import DecodeError

    try:
        return messages(Dialect.BVLC).Datum.FromString(bytes(value))
    except DecodeError:
        raise UserError(f"{where}: not a Datum message: make the LMDB again") from None


def _shape(where: str, datum: Any) -> _Shape:
    if datum.encoded:
        return _decoded_shape(where, datum.data)
    shape = _Shape(datum.channels, datum.height, datum.width)
    values = len(datum.data) or len(datum.float_data)
    if not values or values != shape.channels * shape.height * shape.width:
        raise UserError(
            f"{where}: {values} values, where channels x height x width are"
            f" {shape.channels} x {shape.height} x {shape.width}: make the LMDB again"
        )
    return shape


def _decoded_shape(where: str, image: bytes) -> _Shape:
    import cv2
    import numpy as np

    pixels = None
    if image:
        try:
            pixels = cv2.imdecode(np.frombuffer(image, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
        except cv2.error:
            pixels = None
    if pixels is None:
        raise UserError(f"{where}: the image cannot be decoded: make the LMDB again")
    height, width = pixels.shape[:2]
    return _Shape(pixels.shape[2] if pixels.ndim == 3 else 1, height, width)


def record_place(folder: Path, key: bytes) -> str:
    """A record, as messages name it."""
    return f"LMDB {folder}, record {os.fsdecode(key)!r}"
