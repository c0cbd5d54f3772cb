"""What is in an LMDB or a list, in brief: enough to notice that it has been replaced by another one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import count_of
from caffe_jacinto.data.datum import parse_datum
from caffe_jacinto.data.encode import BadImageError
from caffe_jacinto.data.lmdb_reader import FIRST_LABELS, LmdbReader

_SPREAD = 64
"""Records that are read from the first to the last, beside the first ones."""


@dataclass(frozen=True)
class LmdbIdentity:
    """Two LMDBs with the same one hold the same images, as far as this can be seen without reading them."""

    images: int
    first_key: str
    last_key: str
    labels: str
    """SHA-256 of keys and labels of the first 500 records, and of 64 spread over all."""

    def difference(self, now: LmdbIdentity) -> str | None:
        """What has changed since this was read, in words; None if nothing has."""
        if self == now:
            return None
        if (self.images, self.first_key, self.last_key) == (now.images, now.first_key, now.last_key):
            return f"its {count_of(self.images, 'image')} have other names or labels than before"
        return f"it had {self._words()}, and has {now._words()} now"

    def _words(self) -> str:
        return f"{count_of(self.images, 'image')} ({self.first_key!r} to {self.last_key!r})"


def data_identity(path: Path) -> LmdbIdentity:
    """The identity of an LMDB, or of the list of an ImageData or HDF5Data layer: all that this says.

    Raises:
        UserError: it cannot be read, or a record is not an image.
    """
    if not path.is_file():
        return lmdb_identity(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    lines = [line for line in content.split(b"\n") if line.strip()] or [b""]
    first, last = (line.decode("utf-8", "backslashreplace") for line in (lines[0], lines[-1]))
    return LmdbIdentity(len(lines), first, last, hashlib.sha256(content).hexdigest())


def lmdb_identity(folder: Path) -> LmdbIdentity:
    """The identity of the LMDB ``folder``, in a fraction of a second for any size.

    Raises:
        UserError: it cannot be read, or a record is not an image.
    """
    labels = hashlib.sha256()
    keys = []
    with LmdbReader(folder) as reader:
        for key, record in (*islice(reader.records(), FIRST_LABELS), *reader.spread(_SPREAD)):
            try:
                labels.update(b"%d %b\n" % (parse_datum(record).label, key))
            except BadImageError as error:
                raise UserError(f"{reader.place(key)}: {error}: make the LMDB again") from None
            keys.append(key)
        first, last = (key.decode("utf-8", "backslashreplace") for key in (min(keys), max(keys)))
        return LmdbIdentity(len(reader), first, last, labels.hexdigest())
