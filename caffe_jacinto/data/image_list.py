"""The images of an ImageData layer: files that a list names, one in each line, with its label."""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import count_of
from caffe_jacinto.data.index import Folder, PackedPaths, UnreadableImageError
from caffe_jacinto.data.listing import list_lines
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages

_LEAST_LABEL = -(2**31)
"""Caffe's are of the type int; those below 0 are labels to ignore."""


class ListedImages:
    """The files of a list by their number, as `NumberedRecords` has an LMDB's."""

    remedy = "replace the file, or remove the line"
    """What to do about a bad image."""

    one_size = "set new_height and new_width, or a crop_size"
    """What to do where images differ in size."""

    def __init__(self, list_file: Path, root: str) -> None:
        """Read the list; paths stay in memory, tens of bytes each.

        ``root`` comes straight before each path, as in Caffe: it ends with a slash where it is a folder.

        Raises:
            UserError: the list cannot be read, a line is not 'path label', or a file does not exist.
        """
        self._list, self._root = list_file, os.fsencode(root)
        self._paths, self._labels, self._lines = PackedPaths(), array("i"), array("q")
        for line, (path, label) in list_lines(list_file, None, least=_LEAST_LABEL):
            self._paths.append(path)
            self._labels.append(label)
            self._lines.append(line)
        self._check_all_exist()

    @property
    def highest_label(self) -> int:
        """0 where all are below."""
        return max(0, *self._labels)

    def __len__(self) -> int:
        return len(self._paths)

    def place(self, number: int) -> str:
        """Image ``number``, as messages name it: line of the list and file."""
        return f"{self._list}:{self._lines[number]}: {os.fsdecode(self._file(number))}"

    def datum(self, number: int) -> Any:
        """Image ``number`` as a Datum: the file and its label.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            content = Folder(Path()).read(self._file(number), 0, 0)
        except UnreadableImageError as error:
            raise UserError(f"{self.place(number)}: {error}: {self.remedy}") from None
        return messages(Dialect.BVLC).Datum(data=content, label=self._labels[number], encoded=True)

    def close(self) -> None:
        """Nothing stays open."""

    def _file(self, number: int) -> bytes:
        return self._root + self._paths[number]

    def _check_all_exist(self) -> None:
        missing = [number for number in range(len(self)) if not os.path.exists(self._file(number))]  # noqa: PTH110
        if not missing:
            return
        number, others = missing[0], len(missing) - 1
        file, hint = self._file(number), self.remedy
        path = file[len(self._root) :]
        if self._root and not self._root.endswith(b"/") and os.path.exists(self._root + b"/" + path):  # noqa: PTH110
            hint = f"root_folder {os.fsdecode(self._root)!r} has to end with a slash"
        elif not self._root and not path.startswith(b"/"):
            hint = "set root_folder, or write the whole path"
        rest = f", nor do {count_of(others, 'other file')} of the list" if others else ""
        raise UserError(
            f"{self._list}:{self._lines[number]}: {os.fsdecode(file)} does not exist{rest}: {hint}"
        )
