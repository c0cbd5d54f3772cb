"""What the lists of ImageData and HDF5Data layers name, before a run: paths, labels, sizes."""

from __future__ import annotations

from math import prod
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import count_of
from caffe_jacinto.data.batches import BatchSource, Images
from caffe_jacinto.data.hdf5_rows import Rows
from caffe_jacinto.data.image_list import ListedImages
from caffe_jacinto.data.lmdb_reader import evenly_spaced
from caffe_jacinto.data.sources import parameters_of, source_of
from caffe_jacinto.netspec.data_fit import DataSize

SAMPLE = 64
"""Images that are decoded."""


def check_list(layer: Any, where: str, path: str, *, min_images: int) -> DataSize:
    """Whether ``layer`` (a LayerParameter), in the file ``where``, can be fed from the list ``path``.

    All paths and labels are looked at; of images, up to 64 are decoded.

    Raises:
        UserError: a file or line of the list that cannot be used, or fewer items than ``min_images``.
    """
    listed = type(layer)()
    listed.CopyFrom(layer)
    parameters_of(listed).source = path
    if layer.type == "ImageData":
        listed.ClearField("transform_param")  # crop and mean are held against the images elsewhere
    source = source_of(listed, where, training=False)
    size = _rows(source) if isinstance(source, Rows) else _images(source)
    if size.images < min_images:
        what = "row" if isinstance(source, Rows) else "image"
        raise UserError(
            f"{path} names {count_of(size.images, what)}, and one batch alone needs {min_images:,}: add "
            "some, or lower the batch size"
        )
    return size


def _rows(rows: Rows) -> DataSize:
    shape = rows.top_shapes[0][1:]
    sides = (shape[-2], shape[-1]) if len(shape) > 1 else (1, 1)
    labelled = len(rows.top_shapes) > 1 and prod(rows.top_shapes[1][1:]) == 1
    return DataSize(len(rows), shape, sides, int(rows.highest(1)) if labelled else 0)


def _images(source: BatchSource) -> DataSize:
    assert isinstance(source, Images) and isinstance(source.records, ListedImages)
    count = len(source.records)
    shapes = [source.image(number).shape for number in evenly_spaced(0, count - 1, min(count, SAMPLE))]
    source.records.close()
    channels, heights, widths = zip(*shapes, strict=True)
    smallest = (channels[0], min(heights), min(widths))
    return DataSize(count, smallest, (max(heights), max(widths)), source.records.highest_label)
