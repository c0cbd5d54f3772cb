"""The batches of an HDF5Data layer: rows of the datasets in the files that a list names.

Follows Caffe 1.0 (src/caffe/layers/hdf5_data_layer.cpp): each top is the dataset of its name; with
``shuffle`` the files come in another order each time, and so do the rows within each. Values are float32. As
for images, the order depends only on the seed and the place in the training.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import looked_for
from caffe_jacinto.data.batches import (
    BatchSource,
    DataLayer,
    Order,
    checked_batch_size,
    only_fields,
    random_numbers,
)
from caffe_jacinto.data.datum import Pixels

_FIELDS = frozenset({"source", "batch_size", "shuffle"})

_CHUNK_CACHE = 1 << 26
"""Bytes of decompressed chunks that a process keeps of each dataset: rows in random order share chunks."""

_NUMBERS = "iuf"
"""NumPy's kinds of the types that Caffe converts to float."""


def hdf5_layer(layer: Any, where: str) -> DataLayer:
    """The settings of the HDF5Data layer ``layer`` (a LayerParameter).

    Raises:
        UserError: a field that is not supported.
    """
    where = f"{where}: layer {layer.name} ({layer.type})"
    only_fields(layer.hdf5_data_param, "hdf5_data_param", _FIELDS, where)
    if layer.HasField("transform_param"):
        raise UserError(f"{where}: has transform_param, and HDF5Data transforms nothing: remove it")
    if not layer.top:
        raise UserError(f"{where}: has no top: give one for each dataset that it reads")
    return DataLayer(
        name=layer.name,
        where=where,
        tops=tuple(layer.top),
        source=Path(layer.hdf5_data_param.source),
        batch_size=checked_batch_size(layer.hdf5_data_param.batch_size, where),
        shuffle=layer.hdf5_data_param.shuffle,
    )


class Rows(BatchSource):
    """Batches of rows: batch x numbers of all tops, one top after the other."""

    def __init__(self, layer: DataLayer, batch_size: int, seed: int, *, shuffle: bool = False) -> None:
        """``batch_size`` is that of this rank; ``seed`` determines the order.

        Raises:
            UserError: the list or one of its files cannot be read, or datasets do not fit each other.
        """
        self.layer, self.batch_size, self._seed = layer, batch_size, seed
        self._shuffle = layer.shuffle or shuffle
        self._files = _files_of(layer)
        self._open: tuple[int, Any] | None = None
        shapes = [self._shapes(number) for number in range(len(self._files))]
        self._row_shapes = [shape[1:] for shape in shapes[0]]
        for number, found in enumerate(shapes):
            self._check_like_first(number, found)
        self._counts = [found[0][0] for found in shapes]
        self._total = sum(self._counts)
        self._order = Order(len(self._files), seed, shuffle=self._shuffle)
        self._epoch: tuple[int, list[int], list[int]] = (-1, [], [])
        self._rows: tuple[int, int, Pixels] = (-1, -1, np.arange(0))
        self._ends = list(accumulate(map(prod, self._row_shapes)))
        self.shape = (batch_size, self._ends[-1])
        self.dtype = np.dtype(np.float32)

    @property
    def top_shapes(self) -> list[tuple[int, ...]]:
        return [(self.batch_size, *shape) for shape in self._row_shapes]

    def __len__(self) -> int:
        return self._total

    def highest(self, top: int) -> float:
        """The largest number of a top, over all files.

        Raises:
            UserError: a file that cannot be read.
        """
        name, found = self.layer.tops[top], []
        for file, count in enumerate(self._counts):
            values = np.empty((count, prod(self._row_shapes[top])), np.float32)
            self._read(file, name, list(range(count)), values)
            found.append(float(values.max()))
        self._close()
        return max(found)

    def columns(self, top: int) -> slice:
        """Where the numbers of a top stand in a row."""
        return slice(self._ends[top - 1] if top else 0, self._ends[top])

    def labels_of(self, top: int, values: Pixels, labels: Pixels) -> Pixels:
        return values[:, self.columns(top)]

    def read(self, block: int, values: Pixels, labels: Pixels, windows: Pixels) -> None:
        """Fill ``values`` (batch x numbers) with batch number ``block``; the other arrays are not used.

        Raises:
            UserError: a file that can no longer be read.
        """
        begin = 0
        for file, rows in self._pieces(block):
            end = begin + len(rows)
            for top, name in enumerate(self.layer.tops):
                self._read(file, name, rows, values[begin:end, self.columns(top)])
            begin = end

    def place(self, block: int, index: int) -> str:
        file, row = self._row(block * self.batch_size + index)
        return f"{self._where(file)}, row {row}"

    def _pieces(self, block: int) -> Iterator[tuple[int, list[int]]]:
        """The rows of a batch, in order, as runs of rows of one file."""
        piece: tuple[int, list[int]] | None = None
        for place in range(block * self.batch_size, (block + 1) * self.batch_size):
            file, row = self._row(place)
            if piece is None or piece[0] != file:
                if piece is not None:
                    yield piece
                piece = (file, [])
            piece[1].append(row)
        assert piece is not None
        yield piece

    def _row(self, place: int) -> tuple[int, int]:
        """The file and row that come ``place``-th."""
        epoch, within = divmod(place, self._total)
        if epoch != self._epoch[0]:
            count = len(self._files)
            files = [self._order.record(epoch * count + number) for number in range(count)]
            self._epoch = (epoch, files, list(accumulate(self._counts[file] for file in files)))
        _, files, ends = self._epoch
        index = bisect_right(ends, within)
        file, row = files[index], within - (ends[index - 1] if index else 0)
        if not self._shuffle:
            return file, row
        if self._rows[:2] != (epoch, file):
            drawn = random_numbers(self._seed, epoch * len(files) + file, "rows")
            self._rows = (epoch, file, drawn.permutation(self._counts[file]))
        return file, int(self._rows[2][row])

    def _read(self, file: int, name: str, rows: list[int], into: Pixels) -> None:
        try:
            dataset = self._file(file)[name]
            first, count = rows[0], len(rows)
            if rows == list(range(first, first + count)):
                found = dataset[first : first + count]
            else:
                # h5py takes numbers in rising order only, each once.
                chosen, places = np.unique(rows, return_inverse=True)
                found = dataset[chosen][places]
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{self._where(file)}: cannot be read ({UserError(error)}): make it again"
            ) from None
        into[...] = np.asarray(found, np.float32).reshape(into.shape)

    def _shapes(self, number: int) -> list[tuple[int, ...]]:
        """The shapes of a file's datasets, in the order of the tops; the file is closed again."""
        found: list[tuple[int, ...]] = []
        try:
            file = self._file(number)
            for name in self.layer.tops:
                if name not in file or not hasattr(file[name], "dtype"):
                    others = ", ".join(sorted(file)) or "nothing"
                    raise UserError(
                        f"{self._where(number)}: has no dataset {name!r}, the name of a top of layer"
                        f" {self.layer.name}; it has {others}"
                    )
                dataset = file[name]
                if dataset.dtype.kind not in _NUMBERS:
                    raise UserError(
                        f"{self._where(number)}: dataset {name!r} is of the type {dataset.dtype}, and Caffe"
                        " reads whole and floating-point numbers only"
                    )
                found.append(tuple(map(int, dataset.shape)))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{self._where(number)}: cannot be read ({UserError(error)}): make it again"
            ) from None
        finally:
            self._close()
        rows = {shape[:1] for shape in found}
        if len(rows) > 1 or () in rows or (0,) in rows:
            shown = ", ".join(
                f"{name} {_sizes(shape)}" for name, shape in zip(self.layer.tops, found, strict=True)
            )
            raise UserError(
                f"{self._where(number)}: its datasets need as many rows each, and at least one; they"
                f" are {shown}"
            )
        return found

    def _check_like_first(self, number: int, shapes: list[tuple[int, ...]]) -> None:
        for name, shape, first in zip(self.layer.tops, shapes, self._row_shapes, strict=True):
            if shape[1:] != first:
                raise UserError(
                    f"{self._where(number)}: a row of dataset {name!r} is {_sizes(shape[1:])}, and in"
                    f" {self._files[0][1]} it is {_sizes(first)}: give files of one form"
                )

    def _file(self, number: int) -> Any:
        """A file, open for reading. A process that forks must close it first."""
        import h5py

        if self._open is None or self._open[0] != number:
            self._close()
            # Caffe locks nothing either; another process may read the file at the same time.
            file = h5py.File(self._files[number][1], "r", rdcc_nbytes=_CHUNK_CACHE, locking=False)
            self._open = (number, file)
        return self._open[1]

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _where(self, file: int) -> str:
        line, path = self._files[file]
        return f"{self.layer.source}:{line}: {path}"


def _files_of(layer: DataLayer) -> list[tuple[int, str]]:
    """Line and path of each file in the layer's list; paths are apart by white space, as Caffe reads them."""
    source = layer.source
    if not source.is_file():
        what = "is not a file" if source.exists() else f"does not exist{looked_for(source)}"
        raise UserError(f"{layer.where}: hdf5_data_param.source {source} {what}: give a list of HDF5 files")
    try:
        text = source.read_bytes()
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None
    if text.startswith(b"\x89HDF"):
        raise UserError(
            f"{layer.where}: hdf5_data_param.source {source} is an HDF5 file, and a list of such files is"
            " needed: write its path into a text file"
        )
    files = [
        (number, os.fsdecode(path))
        for number, line in enumerate(text.split(b"\n"), start=1)
        for path in line.split()
    ]
    for number, path in files:
        if not Path(path).is_file():
            hint = "" if Path(path).is_absolute() else "; paths are relative to the folder that you start in"
            raise UserError(f"{source}:{number}: {path} does not exist{hint}")
    if not files:
        raise UserError(f"{layer.where}: hdf5_data_param.source {source} names no files")
    return files


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"
