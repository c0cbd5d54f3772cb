"""The batches of a Data layer: its settings, which record comes when, and each image cropped and mirrored.

Random numbers depend only on the seed and on an image's place in the training, so a resumed training gets
the images that it would have had.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.datum import Pixels, Transform, Window, datum_pixels, parse_datum
from caffe_jacinto.data.encode import BadImageError, jpeg_shape
from caffe_jacinto.data.lmdb_reader import NumberedRecords
from caffe_jacinto.data.mean import read_mean

_TRANSFORM = frozenset(
    {"scale", "mirror", "crop_size", "mean_file", "mean_value", "force_color", "force_gray"}
)
_TRANSFORM_NO_EFFECT = frozenset({"use_gpu_transform", "display"})
_DATA = frozenset({"source", "batch_size", "backend", "force_encoded_color", "shuffle"})
_DATA_NO_EFFECT = frozenset({"prefetch", "threads", "parser_threads", "cache"})


@dataclass(frozen=True)
class DataLayer:
    """The settings in a Data layer's message."""

    name: str
    where: str
    """The file and the layer, for messages."""

    tops: tuple[str, ...]
    """The images' blob and, if there is a second, the labels'."""

    source: Path
    batch_size: int
    """As the file gives it."""

    transform: Transform
    shuffle: bool
    """Another order each time through the LMDB."""

    training: bool
    """Whether crops are placed at random."""


def data_layer(layer: Any, where: str, *, training: bool) -> DataLayer:
    """The settings of the Data layer ``layer`` (a LayerParameter).

    Raises:
        UserError: a field that is not supported, or that contradicts another; or an unusable mean file.
    """
    where = f"{where}: layer {layer.name} (Data)"
    data, transform = layer.data_param, layer.transform_param
    for fields, name, known in (
        (data, "data_param", _DATA | _DATA_NO_EFFECT),
        (transform, "transform_param", _TRANSFORM | _TRANSFORM_NO_EFFECT),
    ):
        for descriptor, _ in fields.ListFields():
            if descriptor.name not in known:
                raise UserError(f"{where}: {name}.{descriptor.name} is not supported: remove it")
    if data.backend != type(data).LMDB:
        raise UserError(f"{where}: data_param.backend must be LMDB")
    if data.batch_size < 1 or not 1 <= len(layer.top) <= 2:
        raise UserError(f"{where}: a batch_size of at least 1 is needed, and one or two tops")
    return DataLayer(
        name=layer.name,
        where=where,
        tops=tuple(layer.top),
        source=Path(data.source),
        batch_size=data.batch_size,
        transform=read_transform(transform, where, force_color=data.force_encoded_color),
        shuffle=training and bool(getattr(data, "shuffle", False)),
        training=training,
    )


def read_transform(settings: Any, where: str, *, base: Path = Path(), force_color: bool = False) -> Transform:
    """The transform that a ``transform_param`` message describes.

    Args:
        where: the file (and layer), for messages.
        base: the folder that a relative mean_file is relative to.
        force_color: whether another field of the layer asks for colour, too.

    Raises:
        UserError: fields contradict each other, or the mean file cannot be used.
    """
    for one, other in (("mean_file", "mean_value"), ("force_color", "force_gray")):
        if getattr(settings, one) and getattr(settings, other):
            raise UserError(
                f"{where}: has {one} and {other}, and Caffe takes only one of them: remove the other"
            )
    colour = True if settings.force_color or force_color else None
    return Transform(
        crop=settings.crop_size,
        mirror=settings.mirror,
        scale=settings.scale,
        mean_values=tuple(settings.mean_value),
        mean_image=read_mean(base / settings.mean_file) if settings.mean_file else None,
        colour=False if settings.force_gray else colour,
    )


class Order:
    """Which record comes at each place of a training."""

    def __init__(self, records: int, seed: int, *, shuffle: bool) -> None:
        self._records, self._seed, self._shuffle = records, seed, shuffle
        self._epoch = -1

    def record(self, place: int) -> int:
        """The number of the record that comes ``place``-th (from 0); every epoch has each once."""
        epoch, within = divmod(place, self._records)
        if not self._shuffle:
            return within
        if epoch != self._epoch:
            self._permutation = random_numbers(self._seed, epoch, "order").permutation(self._records)
            self._epoch = epoch
        return int(self._permutation[within])


def random_numbers(seed: int, place: int, purpose: str) -> np.random.Generator:
    """Random numbers that are the same for the same arguments (Philox, counter-based)."""
    stream = {"order": 0, "images": 1, "dropout": 2, "seed": 3}[purpose]
    return np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), stream], counter=[0, 0, 0, place]))


class Images:
    """Batches of a Data layer as arrays: images cut to their windows, their mean and scale still to apply."""

    def __init__(self, layer: DataLayer, batch_size: int, seed: int, *, shuffle: bool = False) -> None:
        """``batch_size`` is that of this rank; ``seed`` determines order, crops and mirroring.

        Raises:
            UserError: the LMDB cannot be read, or its first image does not fit the layer.
        """
        self.layer, self.batch_size, self._seed = layer, batch_size, seed
        self.records = NumberedRecords(layer.source)
        self._order = Order(len(self.records), seed, shuffle=layer.shuffle or shuffle)
        _, first = self._read(0)
        self.records.close()
        channels, height, width = first.shape
        self.stored_shape: tuple[int, int, int] = channels, height, width
        """Channels, height and width of the first record's image."""

        self.dtype = first.dtype
        crop = layer.transform.crop
        self.shape = (batch_size, crop or height, crop or width, channels)
        """Of a batch of images, channels last."""

    def read(self, block: int, images: Pixels, labels: Pixels, windows: Pixels) -> None:
        """Fill the arrays with the images of batch number ``block``, their labels, and each one's window.

        ``images`` is batch x height x width x channels, ``windows`` batch x (top, left, mirrored).

        Raises:
            UserError: a record without an image, or one that does not fit.
        """
        transform, anywhere = self.layer.transform, self.layer.training
        for i, chance in enumerate(self._chances(block)):
            number = self._order.record(block * self.batch_size + i)
            datum, pixels = self._read(number)
            self._check_like_first(number, pixels)
            _, height, width = pixels.shape
            window = transform.window(height, width, chance, anywhere=anywhere)
            _put(transform, pixels, window, images[i])
            labels[i] = datum.label
            windows[i] = window

    def read_files(self, block: int, labels: Pixels, windows: Pixels) -> list[bytes] | None:
        """As `read`, with the images as they are stored; None unless all are colour JPEG files of one size.

        Raises:
            UserError: a record that holds no Datum.
        """
        files = []
        for i, chance in enumerate(self._chances(block)):
            number = self._order.record(block * self.batch_size + i)
            datum = self._stored(number)
            if not self._is_colour_jpeg(datum):
                return None
            _, height, width = self.stored_shape
            files.append(datum.data)
            labels[i] = datum.label
            windows[i] = self.layer.transform.window(height, width, chance, anywhere=self.layer.training)
        return files

    def _chances(self, block: int) -> list[list[float]]:
        """Three random numbers for each image of a batch; see `Transform.window`."""
        drawn = random_numbers(self._seed, block, "images").random((self.batch_size, 3))
        chances: list[list[float]] = drawn.tolist()
        return chances

    @property
    def batch_bytes(self) -> int:
        """The bytes of a batch of decoded images."""
        return math.prod(self.shape) * self.dtype.itemsize

    def first_files(self, count: int) -> list[bytes] | None:
        """The first images as they are stored; None unless all are colour JPEG files of one size."""
        datums = [self._stored(number) for number in range(min(count, len(self.records)))]
        self.records.close()
        return [datum.data for datum in datums] if all(map(self._is_colour_jpeg, datums)) else None

    def _is_colour_jpeg(self, datum: Any) -> bool:
        """Whether it is a colour JPEG file of the first image's size."""
        shape = self.stored_shape
        return shape[0] == 3 and bool(datum.encoded) and jpeg_shape(datum.data) == shape

    def decode_first(self, count: int) -> None:
        """Read and decode the first images, to see how long that takes."""
        for number in range(min(count, len(self.records))):
            self._read(number)
        self.records.close()

    def place(self, block: int, index: int) -> str:
        """The record that is number ``index`` of batch number ``block``, for messages."""
        return self.records.place(self._order.record(block * self.batch_size + index))

    def _stored(self, number: int) -> Any:
        """The Datum of record ``number``."""
        try:
            return parse_datum(self.records.get(number))
        except BadImageError as error:
            raise UserError(f"{self.records.place(number)}: {error}: make the LMDB again") from None

    def _read(self, number: int) -> tuple[Any, Pixels]:
        """The Datum of record ``number``, and its image, which is at least as large as the crop."""
        datum = self._stored(number)
        try:
            pixels = datum_pixels(datum, self.layer.transform.colour)
        except BadImageError as error:
            raise UserError(f"{self.records.place(number)}: {error}: make the LMDB again") from None
        height, width = pixels.shape[1:]
        if min(height, width) < self.layer.transform.crop:
            raise UserError(
                f"{self.records.place(number)}: its image of {width}x{height} pixels is smaller than the crop"
                f" of {self.layer.transform.crop}"
            )
        return datum, pixels

    def _check_like_first(self, number: int, pixels: Pixels) -> None:
        """Refuse an image that does not go into a batch with the first one."""
        transform = self.layer.transform
        any_size = transform.crop and transform.mean_image is None
        if pixels.shape[0] != self.stored_shape[0] or not (any_size or pixels.shape == self.stored_shape):
            sizes = ["x".join(map(str, shape)) for shape in (pixels.shape, self.stored_shape)]
            raise UserError(
                f"{self.records.place(number)}: its image is {sizes[0]} (channels x height x width), and the"
                f" first one {sizes[1]}: make the LMDB with one size"
            )
        if pixels.dtype != self.dtype:
            kinds = ["8-bit" if dtype == np.uint8 else f"{dtype}" for dtype in (pixels.dtype, self.dtype)]
            raise UserError(
                f"{self.records.place(number)}: its image is {kinds[0]}, and the first one {kinds[1]}: make"
                " the LMDB again"
            )


def _put(transform: Transform, pixels: Pixels, window: Window, into: Pixels) -> None:
    """Copy the window of an image (channels first) into ``into`` (channels last)."""
    if window.mirrored and into.shape[2] > 1:
        import cv2

        # Ten times as fast as NumPy's copy of a reversed array.
        cv2.flip(transform.cut(pixels, window._replace(mirrored=False)).transpose(1, 2, 0), 1, into)
    else:
        into[...] = transform.cut(pixels, window).transpose(1, 2, 0)
