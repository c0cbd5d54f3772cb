"""Reading an LMDB of images: the only place where one is opened for reading, and the check before a run.

It is opened read-only and without its lock file, so that a Caffe that reads it at the same time is not
disturbed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import looked_for
from caffe_jacinto.common.text import count_of, image_progress
from caffe_jacinto.data.datum import parse_datum, read_record
from caffe_jacinto.data.encode import BadImageError
from caffe_jacinto.netspec.data_fit import DataSize

Record = tuple[bytes, bytes]
"""Key and value."""

FIRST_LABELS = 500
"""Labels that `check_lmdb` reads from the beginning, to see whether the images come class by class."""

SHOWN_LABELS = 10
"""Labels that a note lists."""

ENOUGH_FOR_ORDER = 20
"""With fewer records, any order of labels may be chance."""

_NUMBERED_KEY = re.compile(rb"([0-9]{8})_")


class LmdbReader:
    """An LMDB that is open for reading; a context manager. LMDB's own errors become a UserError."""

    def __init__(self, folder: Path, *, readahead: bool = True) -> None:
        """Open the LMDB ``folder``; without ``readahead`` the system reads only what is asked for.

        Raises:
            UserError: the LMDB is missing, not an LMDB, not readable for this user, damaged, cut off or
                empty.
        """
        import lmdb

        check_folder(folder)
        self.folder = folder
        try:
            self._environment: Any = lmdb.open(str(folder), readonly=True, lock=False, readahead=readahead)
            try:
                check_not_cut_off(folder, self._environment)
                self._entries: int = self._environment.stat()["entries"]
                if not self._entries:
                    raise UserError(f"LMDB {folder} is empty: make it again")
                self._transaction: Any = self._environment.begin()
            except BaseException:
                self._environment.close()
                raise
        except lmdb.Error as error:
            raise _damaged(folder, error) from None

    def __len__(self) -> int:
        return self._entries

    @property
    def last_change(self) -> int:
        """The number of the last transaction that was written, by any process."""
        return int(self._environment.info()["last_txnid"])

    def records(self) -> Iterator[Record]:
        """All records in key order."""
        with self._cursor() as cursor:
            yield from cursor

    def read_keys(self) -> Iterator[bytes]:
        """All keys in order."""
        with self._cursor() as cursor:
            yield from cursor.iternext(keys=True, values=False)

    def get(self, key: bytes) -> bytes | None:
        """The record under ``key``."""
        import lmdb

        try:
            value: bytes | None = self._transaction.get(key)
        except lmdb.Error as error:
            raise _damaged(self.folder, error) from None
        return value

    def spread(self, count: int) -> Iterator[Record]:
        """About ``count`` records from the first to the last.

        They are evenly spaced where the keys begin with numbers, as convert_imageset writes them; otherwise
        half of them are the first and half the last.
        """
        with self._cursor() as cursor:
            cursor.first()
            first = _NUMBERED_KEY.match(cursor.key())
            cursor.last()
            last = _NUMBERED_KEY.match(cursor.key())
            if len(self) <= count or first is None or last is None:
                half = (count + 1) // 2
                yield from islice(self.records(), half)
                cursor.last()
                yield from islice(cursor.iterprev(), max(min(count, len(self)) - half, 0))
                return
            before = b""
            for number in evenly_spaced(int(first[1]), int(last[1]), count):
                # Numbers are missing where images were left out: take the next record.
                if cursor.set_range(b"%08d_" % number) and cursor.key() != before:
                    before = cursor.key()
                    yield cursor.item()

    @contextlib.contextmanager
    def _cursor(self) -> Iterator[Any]:
        import lmdb

        try:
            with self._transaction.cursor() as cursor:
                yield cursor
        except lmdb.Error as error:
            raise _damaged(self.folder, error) from None

    def place(self, key: bytes) -> str:
        """The record under ``key``, as messages name it."""
        return record_place(self.folder, key)

    def close(self) -> None:
        """Close the LMDB; may be called twice."""
        self._environment.close()

    def __enter__(self) -> LmdbReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class NumberedRecords:
    """The records of an LMDB by their number in key order.

    The LMDB is open from the first read to `close`. A process that forks must close it first: an open LMDB
    must not be used in a child.
    """

    remedy = "make the LMDB again"
    """What to do about a bad image."""

    one_size = "make the LMDB with one size"
    """What to do where images differ in size."""

    def __init__(self, folder: Path) -> None:
        """Read all keys; they stay in memory, tens of bytes each. Raises UserError as `LmdbReader` does."""
        self._folder = folder
        self._reader: LmdbReader | None = None
        keys, ends = bytearray(), array("q")
        with LmdbReader(folder) as reader:
            for key in reader.read_keys():
                keys += key
                ends.append(len(keys))
        self._keys, self._ends = bytes(keys), ends

    def __len__(self) -> int:
        return len(self._ends)

    def key(self, number: int) -> bytes:
        """The key of record ``number``."""
        return self._keys[self._ends[number - 1] if number else 0 : self._ends[number]]

    def place(self, number: int) -> str:
        """Record ``number``, as messages name it."""
        return record_place(self._folder, self.key(number))

    def get(self, number: int) -> bytes:
        """The content of record ``number``.

        Raises:
            UserError: as `LmdbReader`; or the record has been removed.
        """
        if self._reader is None:
            self._reader = LmdbReader(self._folder, readahead=False)
        value = self._reader.get(self.key(number))
        if value is None:
            raise UserError(f"{self.place(number)}: the record is no longer there")
        return value

    def datum(self, number: int) -> Any:
        """The Datum of record ``number``.

        Raises:
            UserError: as `get`.
            BadImageError: the record holds none.
        """
        return parse_datum(self.get(number))

    def close(self) -> None:
        """Close the LMDB; the next read opens it again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def record_place(folder: Path, key: bytes) -> str:
    """A record, as messages name it."""
    return f"LMDB {folder}, record {os.fsdecode(key)!r}"


def evenly_spaced(first: int, last: int, count: int) -> list[int]:
    """``count`` whole numbers from ``first`` to ``last``, both included, as evenly spaced as they can be."""
    return [first + (last - first) * step // max(count - 1, 1) for step in range(count)]


def is_lmdb_folder(path: Path) -> bool:
    """Whether ``path`` is a folder with an LMDB's data file in it; its content is not looked at."""
    return (path / "data.mdb").is_file()


def check_folder(folder: Path) -> None:
    """Raise UserError unless ``folder`` is an LMDB that this user may read; its content is not looked at."""
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
        path, output = shlex.quote(str(folder)), shlex.quote(f"{folder}_lmdb")
        raise UserError(
            f"{folder} is not an LMDB: there is no data.mdb in it; if it holds images in a folder for each"
            f" class: python -m caffe_jacinto.create_lmdb --images {path} --output {output}"
        )
    if not os.access(folder / "data.mdb", os.R_OK):
        raise UserError(f"LMDB {folder} cannot be read: no permission for {folder / 'data.mdb'}")


def check_not_cut_off(folder: Path, environment: Any) -> None:
    """Raise UserError for an open LMDB whose file lacks its end.

    Reading a page beyond the end of the file would kill this process, and Caffe, with a bus error.
    """
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    actual = (folder / "data.mdb").stat().st_size
    if actual < needed:
        raise UserError(
            f"LMDB {folder} is cut off: data.mdb has {actual:,} bytes of {needed:,}; copy or make it again"
        )


def why_reader_ended(exit_code: int | None) -> str:
    """Why a process that read an LMDB ended by itself, with the negative number of a signal as exit code."""
    if exit_code == -signal.SIGBUS:  # a page of the file that is no longer there
        return "it was cut off or replaced while it was read: copy or make it again"
    if exit_code == -signal.SIGKILL:
        return "a process that reads it was killed; is there enough memory?"
    return f"a process that reads it ended with exit code {exit_code}"


def _damaged(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder} cannot be read as an LMDB ({error}): make it again")


# ------------------------------------------------------------------------------ the check before a run


@dataclass(frozen=True)
class LmdbFacts:
    """What `check_lmdb` found.

    Attributes:
        images: all records, as LMDB counts them.
        channels: of the sampled images.
        height, width: the smallest of the sampled images, in pixels.
        largest: the largest height and width.
        highest_label: of the records whose label was read.
        sampled: images that were decoded.
        notes: what is allowed but probably a mistake, one sentence each, to be shown as warnings.
    """

    images: int
    channels: int
    height: int
    width: int
    largest: tuple[int, int]
    highest_label: int
    sampled: int
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> DataSize:
        """What a network is held against."""
        shape = (self.channels, self.height, self.width)
        return DataSize(self.images, shape, self.largest, self.highest_label)


def check_lmdb(
    path: str,
    *,
    num_classes: int | None,
    min_images: int,
    min_size: int,
    sample: int = 64,
    training: bool = False,
    channels: int | None = 3,
) -> LmdbFacts:
    """Whether Caffe can train or test a network with an LMDB, in well under a second.

    Decodes ``sample`` images (see `LmdbReader.spread`) and reads the labels of the first 500 records.

    Args:
        path: the LMDB's folder.
        num_classes: labels must be below it; None where it is not known.
        min_images: the fewest records allowed: one batch.
        min_size: the smallest side allowed, in pixels: the crop.
        training: whether order and classes matter: images sorted by class and classes without images then
            get a note.
        channels: of the network's input; None where any will do that all images have.

    Raises:
        UserError: the LMDB cannot be read, has fewer records, or a record does not fit.
    """
    folder = Path(path)
    sizes: list[tuple[int, int]] = []
    first_labels: list[int] = []
    spread_labels: list[int] = []
    with LmdbReader(folder) as reader:
        if len(reader) < min_images:
            setting = "batch_size" if training else "val_batch_size"
            raise UserError(
                f"LMDB {folder} holds {count_of(len(reader), 'image')}, and one batch alone needs"
                f" {min_images:,}: add images, or lower training.{setting}"
            )
        for key, record in islice(reader.records(), FIRST_LABELS):
            try:
                first_labels.append(parse_datum(record).label)
            except BadImageError as error:
                raise UserError(f"{reader.place(key)}: {error}: make the LMDB again") from None
            _check_label(reader.place(key), first_labels[-1], num_classes)
        for key, record in reader.spread(sample):
            datum, pixels = read_record(reader.place(key), record)
            _check_label(reader.place(key), datum.label, num_classes)
            channels = pixels.shape[0] if channels is None else channels
            _check_shape(reader.place(key), pixels.shape, channels, min_size)
            spread_labels.append(datum.label)
            sizes.append(pixels.shape[1:])
    labels = first_labels + spread_labels
    notes = _lock_notes(folder)
    if training:
        all_read = len(reader) <= FIRST_LABELS
        classes = max(labels) + 1 if num_classes is None else num_classes
        notes = _class_notes(folder, first_labels if all_read else spread_labels, classes, all_read) + notes
        notes = _order_notes(folder, first_labels, labels) + notes
    assert channels is not None  # an LMDB has at least one record
    return LmdbFacts(
        images=len(reader),
        channels=channels,
        height=min(height for height, _ in sizes),
        width=min(width for _, width in sizes),
        largest=(max(height for height, _ in sizes), max(width for _, width in sizes)),
        highest_label=max(labels),
        sampled=len(sizes),
        notes=notes,
    )


def highest_label(folder: Path) -> int:
    """The highest label of all records of an LMDB, which are read in full: an image may be of any class.

    Raises:
        UserError: the LMDB cannot be read, or a record is not an image.
    """
    highest = 0
    with LmdbReader(folder) as reader, image_progress(f"labels of {folder.name}", len(reader)) as advance:
        for key, record in reader.records():
            try:
                highest = max(highest, parse_datum(record).label)
            except BadImageError as error:
                raise UserError(f"{reader.place(key)}: {error}: make the LMDB again") from None
            advance()
    return highest


def _check_label(where: str, label: int, num_classes: int | None) -> None:
    if label < 0:
        raise UserError(f"{where}: label {label} is below 0: make the LMDB again")
    if num_classes is not None and label >= num_classes:
        raise UserError(
            f"{where}: label {label}, but the network has {num_classes} classes (labels 0 to"
            f" {num_classes - 1}): set the number of classes, or make the LMDB with labels from 0"
        )


def _check_shape(where: str, shape: tuple[int, ...], channels: int, min_size: int) -> None:
    own, height, width = shape
    if own != channels:
        raise UserError(
            f"{where}: the image has {count_of(own, 'channel')}, and the network takes {channels}: make the"
            f" LMDB again{' in colour' * (channels == 3)}"
        )
    if min(height, width) < min_size:
        raise UserError(
            f"{where}: the image is {width}x{height} pixels, smaller than the crop of {min_size}x{min_size}:"
            " make the LMDB with larger images, or reduce the crop"
        )


def _order_notes(folder: Path, first_labels: list[int], labels: list[int]) -> tuple[str, ...]:
    in_order = len(first_labels) >= ENOUGH_FOR_ORDER and first_labels == sorted(first_labels)
    if not in_order or len(set(labels)) == 1:
        return ()
    return (
        f"LMDB {folder} holds its images class by class, and Caffe reads them in that order: training on"
        " batches of one class fails; make the LMDB again, shuffled",
    )


def _class_notes(folder: Path, labels: list[int], classes: int, all_read: bool) -> tuple[str, ...]:
    """A note where most of the ``classes`` have no image, as far as the ``labels`` read show it.

    Labels of a large LMDB are a sample of its records: few different ones are not by chance, many may be.
    """
    seen = sorted(set(labels))
    few = len(seen) < classes if all_read else len(seen) * 4 < len(labels) and len(seen) * 2 < classes
    if not few:
        return ()
    shown = ", ".join(map(str, seen[:SHOWN_LABELS])) + (", ..." if len(seen) > SHOWN_LABELS else "")
    read = "" if all_read else f" among the {count_of(len(labels), 'record')} looked at"
    if len(seen) == 1:
        mend = "make it again with images of every class"
    elif seen[-1] + 1 > len(seen):
        mend = (
            f"if there are no other classes, make it again with labels from 0 to {len(seen) - 1} without gaps"
        )
    else:
        mend = f"if there are no other classes, set data.num_classes to {len(seen)}"
    return (
        f"LMDB {folder} holds images of {count_of(len(seen), 'class')}{read} (label{'s' * (len(seen) > 1)} "
        f"{shown}), and the network has {classes:,}: {mend}",
    )


def _lock_notes(folder: Path) -> tuple[str, ...]:
    """Caffe opens an LMDB with its lock file even to read, unless it was built with ALLOW_LMDB_NOLOCK."""
    lock = folder / "lock.mdb"
    read_only_disk = os.statvfs(folder).f_flag & os.ST_RDONLY  # There LMDB does without the lock file.
    if read_only_disk or os.access(lock if lock.exists() else folder, os.W_OK):
        return ()
    return (
        f"Caffe writes {lock} when it opens this LMDB, and you may not write it: Caffe may stop with"
        " 'Permission denied'; give yourself write permission, or copy the LMDB",
    )
