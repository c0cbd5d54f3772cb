"""The images to store: the path, label and place of each, in tens of bytes an image.

A training set has a million images or more. As Python objects, their names alone would take hundreds of
megabytes; here they are one block of bytes and a few numbers an image, which all threads share.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import stat
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.common.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_KEY_BYTES = 511
"""LMDB's limit for a key as it is compiled everywhere (MDB_MAXKEYSIZE)."""

KEY_NUMBER_BYTES = 9
"""A key begins with eight digits and an underscore."""

MAX_IMAGES = 10**8
"""Eight digits in a key allow no more."""

MAX_FILE_BYTES = 1 << 29
"""No image of at most 100 megapixels is a larger file."""


NOT_A_FILE = "not a file but a folder, a pipe or a device"
"""The reason why such an image is unreadable."""


class UnreadableImageError(Exception):
    """An image that cannot be used; the text is the reason."""


class Folder:
    """Images as files below a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = os.path.join(os.fsencode(path), b"")  # noqa: PTH118 - bytes: names need not be Unicode

    def read(self, path: bytes, _offset: int, _size: int) -> bytes:
        """The content of the image ``path``; raises UnreadableImageError."""
        try:
            # Absolute paths are not below the folder. O_NONBLOCK: a pipe must not wait for its writer.
            name = path if path.startswith(b"/") else self._start + path
            descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise UnreadableImageError(f"{error.strerror}{why_not_found(path)}") from None
        except OSError as error:
            raise UnreadableImageError(error.strerror or str(error)) from None
        except ValueError as error:  # A null character in the path.
            raise UnreadableImageError(str(error)) from None
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise UnreadableImageError(NOT_A_FILE)
            _check_size(facts.st_size)
            return os.read(descriptor, facts.st_size)
        except OSError as error:
            raise UnreadableImageError(error.strerror or str(error)) from None
        finally:
            os.close(descriptor)


def why_not_found(path: bytes) -> str:
    """What a message adds where a list's ``path`` does not exist, if the path itself shows why."""
    if re.match(rb"[A-Za-z]:[\\/]", path):
        return "; the path begins with a drive of Windows: write paths relative to the images' folder"
    if b"\\" in path:
        return "; the path has back slashes: write / between folders"
    if re.search(rb"\.\w+[ \t]+[0-9]+$", path):
        return "; the line seems to have two labels, and an image has one: write 'path label'"
    return ""


class Archive:
    """Images inside an uncompressed tar archive, read in place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"cannot read archive {path}: {error.strerror}") from None
        self.size = os.fstat(self._descriptor).st_size
        self._unusual: list[str | list[tuple[int, int, int]]] = []

    def unreadable(self, reason: str) -> int:
        """An offset for a file of which only that ``reason`` can be read."""
        self._unusual.append(reason)
        return -len(self._unusual)

    def in_parts(self, parts: list[tuple[int, int, int]]) -> int:
        """An offset for a sparse file: place in the file, offset in the archive and length of each part."""
        self._unusual.append(parts)
        return -len(self._unusual)

    def read(self, _path: bytes, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``; raises UnreadableImageError."""
        if offset >= 0:
            _check_size(size)
            return self._whole(offset, size)
        unusual = self._unusual[-offset - 1]
        if isinstance(unusual, str):
            raise UnreadableImageError(unusual)
        _check_size(size)
        content = bytearray(size)
        for place, start, length in unusual:
            content[place : place + length] = self._whole(start, length)
        return bytes(content)

    def _whole(self, offset: int, size: int) -> bytes:
        try:
            content = self.bytes_at(offset, size)
        except OSError as error:
            raise UnreadableImageError(error.strerror or str(error)) from None
        if len(content) != size:
            raise UnreadableImageError("the archive ends inside it")
        return content

    def bytes_at(self, offset: int, size: int) -> bytes:
        """At most ``size`` bytes from ``offset``; fewer at the end."""
        return os.pread(self._descriptor, size, offset)


def _check_size(size: int) -> None:
    if not size:
        raise UnreadableImageError("the file is empty")
    if size > MAX_FILE_BYTES:
        raise UnreadableImageError(f"{size / 1e6:,.0f} MB: too large for an image of at most 100 megapixels")


class PackedPaths:
    """Paths by number from 0, as one block of bytes."""

    def __init__(self) -> None:
        self.text = bytearray()
        self.ends = array("q")

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> bytes:
        return bytes(self.text[self.ends[number - 1] if number else 0 : self.ends[number]])

    def append(self, path: bytes) -> None:
        self.text += path
        self.ends.append(len(self.text))


@dataclass(frozen=True)
class ImageIndex:
    """The images to store, by number from 0; never empty.

    Attributes:
        place: where their content is read.
        names: class names, item N for label N; None where only numbers are known.
        source: how the labels were found, for messages ("10 class folders", "list val.txt").
        ignored: files that are not images by their suffix, and folders in class folders.
        remarks: what else the user should know of them, a line each.
        order: the numbers in the order in which the images are stored; None for 0, 1, 2, ...
    """

    place: Folder | Archive
    names: tuple[str, ...] | None
    source: str
    ignored: int
    _paths: PackedPaths
    _labels: NDArray[np.int32]
    _offsets: NDArray[np.int64] | None = None
    _sizes: NDArray[np.int64] | None = None
    order: NDArray[np.uint32] | None = None
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, number: int) -> bytes:
        """An image's path, as the LMDB's key has it."""
        return self._paths[number]

    def label(self, number: int) -> int:
        return int(self._labels[number])

    def at(self, position: int) -> int:
        """The number of the image that is stored at ``position``."""
        return position if self.order is None else int(self.order[position])

    def span(self, number: int) -> tuple[int, int]:
        """Offset and size of an image's content in an archive; zeros for a file."""
        if self._offsets is None or self._sizes is None:
            return 0, 0
        return int(self._offsets[number]), int(self._sizes[number])

    def read(self, number: int) -> bytes:
        """An image's content; raises UnreadableImageError."""
        return self.place.read(self.path(number), *self.span(number))

    def shuffled(self, seed: int) -> ImageIndex:
        """The same images in a random order, which depends only on ``seed`` and their number."""
        import numpy as np

        order = array("I", range(len(self)))
        random.Random(seed).shuffle(order)
        return replace(self, order=np.frombuffer(order, np.uint32))

    def digest(self) -> str:
        """A hash of the images' paths, labels, places and order."""
        total = hashlib.blake2b(self._paths.text, digest_size=16)
        for part in (self._paths.ends, self._labels, self._offsets, self._sizes, self.order):
            total.update(b"-" if part is None else part.tobytes())
        return total.hexdigest()

    def relabelled(
        self,
        numbers: Iterable[int],
        labels: Iterable[int],
        names: tuple[str, ...] | None,
        source: str,
        *,
        cut: int = 0,
        ignored: int | None = None,
    ) -> ImageIndex:
        """The images ``numbers`` of this index, in that order, with ``labels`` in place of their own.

        ``cut`` bytes are taken off the beginning of each path.
        """
        build = IndexBuilder(self.place)
        for number, label in zip(numbers, labels, strict=True):
            build.add(self.path(number)[cut:], label, *self.span(number))
        return build.index(names, source, self.ignored if ignored is None else ignored, self.remarks)


class IndexBuilder:
    """Collects the images of an `ImageIndex`, which are read from ``place``."""

    def __init__(self, place: Folder | Archive) -> None:
        self._place = place
        self._archived = isinstance(place, Archive)
        self._paths = PackedPaths()
        self._labels = array("i")
        self._offsets = array("q")
        self._sizes = array("q")

    def __len__(self) -> int:
        return len(self._paths)

    def add(self, path: bytes, label: int, offset: int = 0, size: int = 0) -> None:
        """Append an image; ``offset`` and ``size`` are those of its content in an archive.

        Raises:
            UserError: the path is too long for a key, or there are more images than keys.
        """
        size_of_key = len(path) + KEY_NUMBER_BYTES
        if size_of_key > MAX_KEY_BYTES:
            raise UserError(
                f"path {os.fsdecode(path)[:60]!r}… is too long for an LMDB key: {size_of_key} bytes with its"
                f" number, {MAX_KEY_BYTES} at most"
            )
        if len(self._paths) == MAX_IMAGES:
            raise UserError(f"more than {MAX_IMAGES:,} images: Caffe's keys cannot number more")
        self._paths.append(path)
        self._labels.append(label)
        if self._archived:
            self._offsets.append(offset)
            self._sizes.append(size)

    def index(
        self, names: tuple[str, ...] | None, source: str, ignored: int = 0, remarks: tuple[str, ...] = ()
    ) -> ImageIndex:
        """What has been collected."""
        import numpy as np

        return ImageIndex(
            self._place,
            names,
            source,
            ignored,
            self._paths,
            np.frombuffer(self._labels, np.int32),
            np.frombuffer(self._offsets, np.int64) if self._archived else None,
            np.frombuffer(self._sizes, np.int64) if self._archived else None,
            remarks=remarks,
        )
