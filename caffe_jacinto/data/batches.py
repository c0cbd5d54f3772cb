"""The batches of a Data or ImageData layer: its settings, the order of the records, each image's window.

Random numbers depend only on the seed and on an image's place in the training, so a resumed training gets
the images that it would have had. The settings follow Caffe 1.0 (caffe.proto, src/caffe/layers/data_layer.cpp
and image_data_layer.cpp).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.augment import CHANCES, Augmentation, mixing, read_augmentation
from caffe_jacinto.data.datum import Pixels, Transform, Window, datum_pixels
from caffe_jacinto.data.encode import BadImageError, jpeg_shape
from caffe_jacinto.data.image_list import ListedImages
from caffe_jacinto.data.lmdb_reader import NumberedRecords
from caffe_jacinto.data.mean import read_mean
from caffe_jacinto.recipes.model import AUGMENTATIONS

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TRANSFORM = frozenset(
    {"scale", "mirror", "crop_size", "mean_file", "mean_value", "force_color", "force_gray", *AUGMENTATIONS}
)
_TRANSFORM_NO_EFFECT = frozenset({"use_gpu_transform", "display"})
_DATA = frozenset({"source", "batch_size", "backend", "force_encoded_color", "shuffle"})
_DATA_NO_EFFECT = frozenset({"prefetch", "threads", "parser_threads", "cache"})
_IMAGE_DATA = frozenset(
    {
        *("source", "batch_size", "rand_skip", "shuffle", "new_height", "new_width", "is_color"),
        "root_folder",
    }
)
_OF_RECORDS = frozenset({"force_color", "force_gray"})
"""Fields of transform_param that Caffe applies to encoded records only."""


_EXIF = b"Exif\0\0"
_EXIF_BEGINS = 4096
"""Bytes of a JPEG file in which its EXIF segment begins, if there is one."""


@dataclass(frozen=True)
class DataLayer:
    """The settings in the message of a layer that reads a data set."""

    name: str
    where: str
    """The file and the layer, for messages."""

    tops: tuple[str, ...]
    """The images' blob and, if there is a second, the labels'."""

    source: Path
    batch_size: int
    """As the file gives it."""

    shuffle: bool
    """Another order each time through the data."""


@dataclass(frozen=True)
class ImageLayer(DataLayer):
    """The settings of a Data or ImageData layer."""

    transform: Transform
    training: bool
    """Whether crops are placed at random."""

    augmentation: Augmentation
    """Of training images."""

    root: str | None = None
    """What a list's paths begin with; None: the source is an LMDB."""

    resize: tuple[int, int] | None = None
    """Height and width that images are resized to."""

    skip: int = 0
    """The training begins at a random place among so many; 0: at the first."""


class BatchSource(ABC):
    """Numbered batches, each of which any process can read."""

    layer: DataLayer
    batch_size: int
    """Of this rank."""

    shape: tuple[int, ...]
    """Of a batch of values as they are stored: its first axis is the batch."""

    dtype: np.dtype[Any]

    @property
    @abstractmethod
    def top_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the layer's tops."""

    @property
    def batch_bytes(self) -> int:
        """The bytes of a batch of values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @abstractmethod
    def read(self, block: int, values: Pixels, labels: Pixels, windows: Pixels) -> None:
        """Fill the arrays with batch number ``block``; labels and windows are those of images.

        Raises:
            UserError: a record that cannot be read, or does not fit.
        """

    def read_files(self, block: int, labels: Pixels, windows: Pixels) -> list[bytes] | None:
        """As `read`, with images as they are stored; None unless all are colour JPEG files of one size."""
        return None

    @abstractmethod
    def place(self, block: int, index: int) -> str:
        """The record that is number ``index`` of batch number ``block``, for messages."""

    @abstractmethod
    def labels_of(self, top: int, values: Pixels, labels: Pixels) -> Pixels:
        """What top number ``top`` holds in a batch that `read` gave: batch x numbers."""


def data_layer(layer: Any, where: str, *, training: bool) -> ImageLayer:
    """The settings of the Data or ImageData layer ``layer`` (a LayerParameter).

    Raises:
        UserError: a field that is not supported, or that contradicts another; or an unusable mean file.
    """
    where = f"{where}: layer {layer.name} ({layer.type})"
    if not 1 <= len(layer.top) <= 2:
        raise UserError(f"{where}: gives one or two tops, images and labels, and has {len(layer.top)}")
    return (_list_layer if layer.type == "ImageData" else _lmdb_layer)(layer, where, training)


def _lmdb_layer(layer: Any, where: str, training: bool) -> ImageLayer:
    data = layer.data_param
    only_fields(data, "data_param", _DATA | _DATA_NO_EFFECT, where)
    only_fields(layer.transform_param, "transform_param", _TRANSFORM | _TRANSFORM_NO_EFFECT, where)
    if data.backend != type(data).LMDB:
        raise UserError(f"{where}: data_param.backend must be LMDB")
    return ImageLayer(
        name=layer.name,
        where=where,
        tops=tuple(layer.top),
        source=Path(data.source),
        batch_size=checked_batch_size(data.batch_size, where),
        transform=read_transform(layer.transform_param, where, force_color=data.force_encoded_color),
        shuffle=training and bool(getattr(data, "shuffle", False)),
        training=training,
        augmentation=read_augmentation(layer.transform_param, where),
    )


def _list_layer(layer: Any, where: str, training: bool) -> ImageLayer:
    data, transform = layer.image_data_param, layer.transform_param
    only_fields(data, "image_data_param", _IMAGE_DATA, where)
    only_fields(transform, "transform_param", _TRANSFORM | _TRANSFORM_NO_EFFECT, where)
    for name in _OF_RECORDS:
        if getattr(transform, name):
            raise UserError(
                f"{where}: transform_param.{name} changes nothing here: remove it, or set"
                " image_data_param.is_color"
            )
    height, width = data.new_height, data.new_width
    if bool(height) != bool(width):
        raise UserError(f"{where}: image_data_param has one of new_height and new_width: give both or none")
    if transform.crop_size and height and min(height, width) < transform.crop_size:
        raise UserError(
            f"{where}: transform_param.crop_size {transform.crop_size} is larger than new_width x new_height,"
            f" {width}x{height}"
        )
    settings = read_transform(transform, where)
    return ImageLayer(
        name=layer.name,
        where=where,
        tops=tuple(layer.top),
        source=Path(data.source),
        batch_size=checked_batch_size(data.batch_size, where),
        transform=replace(settings, colour=data.is_color),
        shuffle=data.shuffle,
        training=training,
        augmentation=read_augmentation(transform, where),
        root=data.root_folder,
        resize=(height, width) if height else None,
        skip=data.rand_skip,
    )


def only_fields(message: Any, name: str, known: frozenset[str], where: str) -> None:
    """Raise UserError if a field of ``message``, which is ``name`` in the layer, is not ``known``."""
    for descriptor, _ in message.ListFields():
        if descriptor.name not in known:
            raise UserError(f"{where}: {name}.{descriptor.name} is not supported: remove it")


def checked_batch_size(batch_size: int, where: str) -> int:
    """``batch_size``; raises UserError unless it is at least 1."""
    if batch_size < 1:
        raise UserError(f"{where}: batch_size is {batch_size}, and has to be at least 1")
    return batch_size


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

    def __init__(self, records: int, seed: int, *, shuffle: bool, first: int = 0) -> None:
        """``first`` is where the first epoch begins."""
        self._records, self._seed, self._shuffle, self._first = records, seed, shuffle, first
        self._epoch = -1

    def record(self, place: int) -> int:
        """The number of the record that comes ``place``-th (from 0); every epoch has each once."""
        epoch, within = divmod(self._first + place, self._records)
        if not self._shuffle:
            return within
        if epoch != self._epoch:
            self._permutation = random_numbers(self._seed, epoch, "order").permutation(self._records)
            self._epoch = epoch
        return int(self._permutation[within])


def random_numbers(seed: int, place: int, purpose: str) -> np.random.Generator:
    """Random numbers that are the same for the same arguments (Philox, counter-based)."""
    stream = {
        "order": 0,
        "images": 1,
        "dropout": 2,
        "seed": 3,
        "skip": 4,
        "rows": 5,
        "augment": 6,
        "mixup": 7,
    }[purpose]
    return np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), stream], counter=[0, 0, 0, place]))


class Images(BatchSource):
    """Batches of images: cut to their windows, their mean and scale still to apply."""

    layer: ImageLayer

    def __init__(self, layer: ImageLayer, batch_size: int, seed: int, *, shuffle: bool = False) -> None:
        """``batch_size`` is that of this rank; ``seed`` determines order, crops and mirroring.

        Raises:
            UserError: the LMDB or list cannot be read, or its first image does not fit the layer.
        """
        self.layer, self.batch_size, self._seed = layer, batch_size, seed
        self.records = (
            NumberedRecords(layer.source) if layer.root is None else ListedImages(layer.source, layer.root)
        )
        count = len(self.records)
        if layer.skip > count:
            raise UserError(f"{layer.where}: rand_skip {layer.skip} is above the {count} images of the list")
        first = int(random_numbers(seed, 0, "skip").integers(layer.skip)) if layer.skip else 0
        self._order = Order(count, seed, shuffle=layer.shuffle or shuffle, first=first)
        _, pixels = self._read(0)
        self.records.close()
        channels, height, width = pixels.shape
        self.stored_shape: tuple[int, int, int] = channels, height, width
        """Channels, height and width of the first record's image."""

        self.dtype = pixels.dtype
        self.augmentation = layer.augmentation if layer.training else Augmentation()
        if self.augmentation.jitters and self.dtype != np.uint8:
            raise UserError(
                f"{layer.where}: brightness and colours change in 8-bit images only, and those of "
                f"{layer.source} are {self.dtype}: remove random_brightness, random_contrast and "
                "random_saturation"
            )
        crop = layer.transform.crop
        self.shape = (batch_size, crop or height, crop or width, channels)
        """Of a batch of images, channels last."""

    def image(self, number: int) -> Pixels:
        """The image of record ``number``, channels x height x width, before it is cut to its window.

        Raises:
            UserError: it cannot be read, or is smaller than the crop.
        """
        return self._read(number)[1]

    @property
    def top_shapes(self) -> list[tuple[int, ...]]:
        batch, height, width, channels = self.shape
        return [(batch, channels, height, width), (batch,)]

    def labels_of(self, top: int, values: Pixels, labels: Pixels) -> Pixels:
        """The labels, which are the second top."""
        return labels[:, None]

    def read(self, block: int, values: Pixels, labels: Pixels, windows: Pixels) -> None:
        """Fill the arrays with the images of batch number ``block``, their labels, and each one's window.

        ``values`` is batch x height x width x channels, ``windows`` batch x (top, left, mirrored).

        Raises:
            UserError: a record without an image, or one that does not fit.
        """
        transform, anywhere = self.layer.transform, self.layer.training
        more = self._more_chances(block)
        for i, chance in enumerate(self._chances(block)):
            number = self._order.record(block * self.batch_size + i)
            datum, pixels = self._read(number)
            self._check_like_first(number, pixels)
            _, height, width = pixels.shape
            window = transform.window(height, width, chance, anywhere=anywhere)
            if self.augmentation.changes_pixels:
                self._put_augmented(pixels, window, more[i], values[i])
            else:
                _put(transform, pixels, window, values[i])
            labels[i] = datum.label
            windows[i] = window

    def read_files(self, block: int, labels: Pixels, windows: Pixels) -> list[bytes] | None:
        """As `read`, with the images as they are stored; None unless all are colour JPEG files of one size.

        None, too, where images are augmented.

        Raises:
            UserError: a record that holds no Datum.
        """
        if self.augmentation.changes_pixels:
            return None
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

    def _more_chances(self, block: int) -> list[list[float]]:
        """The random numbers of each image's augmentation."""
        if not self.augmentation.changes_pixels:
            return []
        drawn = random_numbers(self._seed, block, "augment").random((self.batch_size, CHANCES))
        chances: list[list[float]] = drawn.tolist()
        return chances

    def _put_augmented(self, pixels: Pixels, window: Window, chances: list[float], into: Pixels) -> None:
        """As `_put`, for an image that is augmented."""
        transform, how = self.layer.transform, self.augmentation
        if how.crop_min_area:
            image = how.resized(pixels.transpose(1, 2, 0), chances, transform.crop)
        else:
            image = transform.cut(pixels, window._replace(mirrored=False)).transpose(1, 2, 0)
        if how.jitters:
            image = how.jittered(image, chances)
        into[...] = image[:, ::-1] if window.mirrored else image

    def mixing(self, block: int) -> tuple[float, NDArray[np.int64]] | None:
        """How the images of batch number ``block`` are mixed, as `augment.mixing`; None: they are not."""
        alpha = self.augmentation.mixup_alpha
        if not alpha:
            return None
        return mixing(alpha, self.batch_size, random_numbers(self._seed, block, "mixup"))

    def are_colour_jpegs(self, count: int) -> bool:
        """Whether the first ``count`` images are colour JPEG files of one size."""
        datums = (self._stored(number) for number in range(min(count, len(self.records))))
        found = all(map(self._is_colour_jpeg, datums))
        self.records.close()
        return found

    def _is_colour_jpeg(self, datum: Any) -> bool:
        """Whether it is a colour JPEG file of the first image's size, which needs no turning."""
        shape = self.stored_shape
        if shape[0] != 3 or not datum.encoded or jpeg_shape(datum.data) != shape:
            return False
        # Decoding to colour, OpenCV turns an image by its EXIF orientation; nvJPEG never does.
        return not (self.layer.transform.colour and _EXIF in datum.data[:_EXIF_BEGINS])

    def place(self, block: int, index: int) -> str:
        """The record that is number ``index`` of batch number ``block``, for messages."""
        return self.records.place(self._order.record(block * self.batch_size + index))

    def _stored(self, number: int) -> Any:
        """The Datum of record ``number``."""
        try:
            return self.records.datum(number)
        except BadImageError as error:
            raise self._bad(number, error) from None

    def _bad(self, number: int, error: BadImageError) -> UserError:
        return UserError(f"{self.records.place(number)}: {error}: {self.records.remedy}")

    def _read(self, number: int) -> tuple[Any, Pixels]:
        """The Datum of record ``number``, and its image, which is at least as large as the crop."""
        datum = self._stored(number)
        try:
            pixels = datum_pixels(datum, self.layer.transform.colour)
        except BadImageError as error:
            raise self._bad(number, error) from None
        if self.layer.resize is not None and pixels.shape[1:] != self.layer.resize:
            pixels = _resized(pixels, *self.layer.resize)
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
                f" first one {sizes[1]}: {self.records.one_size}"
            )
        if pixels.dtype != self.dtype:
            kinds = ["8-bit" if dtype == np.uint8 else f"{dtype}" for dtype in (pixels.dtype, self.dtype)]
            raise UserError(
                f"{self.records.place(number)}: its image is {kinds[0]}, and the first one {kinds[1]}:"
                f" {self.records.remedy}"
            )


def _resized(pixels: Pixels, height: int, width: int) -> Pixels:
    """An image (channels first) in another size, as Caffe's ReadImageToCVMat resizes it: bilinear."""
    import cv2

    image = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    channels_first: Pixels = np.atleast_3d(cv2.resize(image, (width, height))).transpose(2, 0, 1)
    return channels_first


def _put(transform: Transform, pixels: Pixels, window: Window, into: Pixels) -> None:
    """Copy the window of an image (channels first) into ``into`` (channels last)."""
    if window.mirrored and into.shape[2] > 1:
        import cv2

        # Ten times as fast as NumPy's copy of a reversed array.
        cv2.flip(transform.cut(pixels, window._replace(mirrored=False)).transpose(1, 2, 0), 1, into)
    else:
        into[...] = transform.cut(pixels, window).transpose(1, 2, 0)
