"""ILSVRC's development kit: the labels of the validation images.

The kit, ``ILSVRC2012_devkit_t12.tar.gz``, holds a number for each validation image
(``data/ILSVRC2012_validation_ground_truth.txt``, line N for the N-th image by name), and ``data/meta.mat``
maps these numbers to synsets. The numbers are the kit's own; Caffe's labels are the ranks of the synsets' ids
in sorted order, from 0.

meta.mat is a MATLAB 5 file. scipy reads it, and runs no code from it.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import count_of
from caffe_jacinto.data.index import ImageIndex

GROUND_TRUTH = "validation_ground_truth.txt"
META = "meta.mat"
MAX_FILE_BYTES = 1 << 26
"""The kit's files have at most some megabytes."""


@dataclass(frozen=True)
class DevelopmentKit:
    """The contents of a kit.

    Attributes:
        path: the kit, for messages.
        names: the synsets' ids in sorted order; the label of each is its index.
        validation: the label of each validation image, sorted by name.
    """

    path: Path
    names: tuple[str, ...]
    validation: tuple[int, ...]

    def label(self, images: ImageIndex) -> ImageIndex:
        """The validation images, complete and sorted by name, with their labels.

        Raises:
            UserError: their number is not that of the kit.
        """
        if len(images) != len(self.validation):
            raise UserError(
                f"{images.place.path} holds {count_of(len(images), 'image')}, and the development kit"
                f" {self.path} has labels for {len(self.validation):,}: give the whole validation set"
            )
        source = f"labels of {self.path.name}"
        return images.relabelled(range(len(images)), self.validation, self.names, source)


def read_devkit(path: Path) -> DevelopmentKit:
    """The labels in the development kit ``path``, a tar.gz.

    Raises:
        UserError: it cannot be read, or is not the kit of a classification task.
    """
    truth, meta = _files(path)
    synset_of = _synsets(path, meta)
    names = tuple(sorted(synset_of.values()))
    label_of = {name: label for label, name in enumerate(names)}
    labels: list[int] = []
    for number, line in enumerate(truth.decode("ascii", "replace").split(), start=1):
        if not line.isascii() or not line.isdigit() or int(line) not in synset_of:
            raise UserError(f"{path}, {GROUND_TRUTH}:{number}: {line[:40]!r} is not the number of a class")
        labels.append(label_of[synset_of[int(line)]])
    if not labels:
        raise UserError(f"{path}, {GROUND_TRUTH} is empty: download the development kit again")
    return DevelopmentKit(path, names, tuple(labels))


def _files(path: Path) -> tuple[bytes, bytes]:
    """The contents of the two files that matter."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                for ending in (GROUND_TRUTH, META):
                    if member.isreg() and member.name.endswith(ending) and member.size <= MAX_FILE_BYTES:
                        content = tar.extractfile(member)
                        assert content is not None  # It is a regular file.
                        found[ending] = content.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"development kit {path} cannot be read: {reason}") from None
    missing = [name for name in (GROUND_TRUTH, META) if name not in found]
    if missing:
        raise UserError(
            f"{path} holds no {missing[0]}: give the development kit of tasks 1 and 2,"
            " ILSVRC2012_devkit_t12.tar.gz"
        )
    return found[GROUND_TRUTH], found[META]


def _synsets(path: Path, meta: bytes) -> dict[int, str]:
    """The synset's id of each class's number, without the hierarchy's inner nodes: those have no images."""
    from scipy.io import loadmat

    try:
        rows: Any = loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
        synsets = {
            int(row["ILSVRC2012_ID"]): str(row["WNID"])
            for row in rows.reshape(-1)
            if int(row["num_children"]) == 0
        }
    # For a damaged file scipy raises whatever it runs into: zlib's error, a MemoryError, any of its own.
    except Exception as error:
        raise UserError(f"{path}, {META} cannot be read: {type(error).__name__}: {error}") from None
    if not synsets or len(set(synsets.values())) != len(synsets):
        raise UserError(f"{path}, {META} does not name each class once: download the development kit again")
    return synsets
