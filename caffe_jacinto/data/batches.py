"""The images of a Data layer, record by record: which one comes when, decoded, cropped and mirrored.

What is random is a function of the seed and of the image's place in the training, so that a training goes on
after a stop with the images that it would have had.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.data.check import check_folder, check_not_cut_off, parse_datum, record_place
from caffe_jacinto.engines.pytorch.layer_setup import TEST, TRAIN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = NDArray[Any]

_TRANSFORM = frozenset(
    {"scale", "mirror", "crop_size", "mean_file", "mean_value", "force_color", "force_gray"}
)
_TRANSFORM_NO_EFFECT = frozenset({"use_gpu_transform", "display"})
_DATA = frozenset({"source", "batch_size", "backend", "force_encoded_color", "shuffle"})
_DATA_NO_EFFECT = frozenset({"prefetch", "threads", "parser_threads", "cache"})


@dataclass(frozen=True)
class DataLayer:
    """What a Data layer's message says."""

    name: str
    where: str
    """The file and the layer, for messages."""

    tops: tuple[str, ...]
    """The images' blob and, if there is a second, the labels'."""

    source: Path
    batch_size: int
    """As it stands in the file."""

    crop: int
    """0: none."""

    mirror: bool
    scale: float
    mean_values: tuple[float, ...]
    mean_file: Path | None
    colour: bool | None
    """Decode to three channels (True) or one (False), or as stored (None)."""

    shuffle: bool
    """Another order each time through the LMDB."""

    phase: int


def data_layer(layer: Any, phase: int, where: str) -> DataLayer:
    """What the Data layer ``layer`` (a LayerParameter) says.

    Raises:
        UserError: a field that is not supported, or that contradicts another.
    """
    where = f"{where}: layer {layer.name} (Data)"
    data, transform = layer.data_param, layer.transform_param
    for fields, name, known in (
        (data, "data_param", _DATA | _DATA_NO_EFFECT),
        (transform, "transform_param", _TRANSFORM | _TRANSFORM_NO_EFFECT),
    ):
        for descriptor, _ in fields.ListFields():
            if descriptor.name not in known:
                raise UserError(f"{where}: {name}.{descriptor.name} is not supported; remove it")
    if data.backend != type(data).LMDB:
        raise UserError(f"{where}: data_param.backend has to be LMDB")
    if data.batch_size < 1 or not 1 <= len(layer.top) <= 2:
        raise UserError(f"{where}: needs a batch_size of at least 1, and one or two tops")
    if transform.HasField("mean_file") and transform.mean_value:
        raise UserError(f"{where}: transform_param has mean_file and mean_value; give one of them")
    if transform.force_color and transform.force_gray:
        raise UserError(f"{where}: transform_param has force_color and force_gray; give one of them")
    colour = True if transform.force_color or data.force_encoded_color else None
    return DataLayer(
        name=layer.name,
        where=where,
        tops=tuple(layer.top),
        source=Path(data.source),
        batch_size=data.batch_size,
        crop=transform.crop_size,
        mirror=transform.mirror,
        scale=transform.scale,
        mean_values=tuple(transform.mean_value),
        mean_file=Path(transform.mean_file) if transform.mean_file else None,
        colour=False if transform.force_gray else colour,
        shuffle=phase == TRAIN and bool(getattr(data, "shuffle", False)),
        phase=phase,
    )


class Records:
    """The records of an LMDB by their number in key order.

    Open from the first read to `close`. A process that forks others has to close it before: LMDB must not be
    taken along.
    """

    def __init__(self, folder: Path) -> None:
        """Read all keys, which takes tens of bytes a record.

        Raises:
            UserError: the LMDB is missing, none, damaged or empty.
        """
        self.folder = folder
        self._environment: Any = None
        check_folder(folder)
        keys = bytearray()
        ends = []
        with self._transaction().cursor() as cursor:
            for key in cursor.iternext(keys=True, values=False):
                keys += key
                ends.append(len(keys))
        if not ends:
            raise UserError(f"LMDB {folder} holds no records: make it again")
        self._keys = bytes(keys)
        self._ends = np.asarray(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def key(self, number: int) -> bytes:
        """The key of record ``number``."""
        start = int(self._ends[number - 1]) if number else 0
        return self._keys[start : int(self._ends[number])]

    def datum(self, number: int) -> Any:
        """The Datum message of record ``number``.

        Raises:
            UserError: the record is none, or was removed since.
        """
        key = self.key(number)
        value = self._transaction().get(key)
        where = record_place(self.folder, key)
        if value is None:
            raise UserError(f"{where}: the record is no longer there")
        return parse_datum(where, value)

    def close(self) -> None:
        """Let go of the LMDB; the next read opens it again."""
        if self._environment is not None:
            self._open.abort()
            self._environment.close()
            self._environment = None

    def _transaction(self) -> Any:
        """A read transaction."""
        if self._environment is None:
            import lmdb

            try:
                environment = lmdb.open(str(self.folder), readonly=True, lock=False, readahead=False)
                check_not_cut_off(self.folder, environment)
            except lmdb.Error as error:
                raise UserError(f"{self.folder} cannot be read as an LMDB ({error}): make it again") from None
            self._environment, self._open = environment, environment.begin(buffers=True)
        return self._open


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
    """Batches of a Data layer, as arrays."""

    def __init__(self, layer: DataLayer, batch_size: int, seed: int, *, shuffle: bool = False) -> None:
        """``batch_size`` is that of this rank; ``seed`` fixes order, crops and mirroring.

        Raises:
            UserError: as `Records`; or the first record's image does not fit the layer.
        """
        self.layer, self.batch_size, self._seed = layer, batch_size, seed
        self.records = Records(layer.source)
        self._order = Order(len(self.records), seed, shuffle=layer.shuffle or shuffle)
        first = self._pixels(0)
        self.records.close()
        self.stored_shape: tuple[int, int, int] = first.shape
        """Height, width, channels of the first record's image."""

        self.dtype = first.dtype
        height, width, channels = first.shape
        side = (layer.crop, layer.crop) if layer.crop else (height, width)
        self.shape = (batch_size, *side, channels)
        """Of a batch of images, channels last."""

    def read(self, block: int, images: Pixels, labels: Pixels, windows: Pixels) -> None:
        """Fill the arrays with the images of batch number ``block``, their labels, and each one's window.

        ``images`` is batch x height x width x channels, ``windows`` batch x (top, left, mirrored).

        Raises:
            UserError: a record that is no image, or one that does not fit.
        """
        chance = random_numbers(self._seed, block, "images").random((self.batch_size, 3))
        for i in range(self.batch_size):
            number = self._order.record(block * self.batch_size + i)
            datum = self.records.datum(number)
            pixels = self._checked(number, _decode(datum, self.layer.colour, self._place(number)))
            top, left, mirrored = self._window(pixels.shape, chance[i])
            height, width = images.shape[1:3]
            cropped = pixels[top : top + height, left : left + width]
            images[i] = cropped[:, ::-1] if mirrored else cropped
            labels[i] = datum.label
            windows[i] = top, left, mirrored

    def place(self, block: int, index: int) -> str:
        """Which record is number ``index`` of batch number ``block``, for messages."""
        return self._place(self._order.record(block * self.batch_size + index))

    def _window(self, shape: tuple[int, ...], chance: NDArray[np.float64]) -> tuple[int, int, bool]:
        """Anywhere in training, in the middle in testing; mirrored in both, as Caffe has it, by chance."""
        layer = self.layer
        mirrored = layer.mirror and bool(chance[2] < 0.5)
        if not layer.crop:
            return 0, 0, mirrored
        rooms = (shape[0] - layer.crop, shape[1] - layer.crop)
        if layer.phase == TEST:
            return rooms[0] // 2, rooms[1] // 2, mirrored
        return int(chance[0] * (rooms[0] + 1)), int(chance[1] * (rooms[1] + 1)), mirrored

    def _pixels(self, number: int) -> Pixels:
        pixels = _decode(self.records.datum(number), self.layer.colour, self._place(number))
        return self._fitting(number, pixels)

    def _fitting(self, number: int, pixels: Pixels) -> Pixels:
        if min(pixels.shape[:2]) < self.layer.crop:
            raise UserError(
                f"{self._place(number)}: its image of {pixels.shape[1]}x{pixels.shape[0]} pixels is smaller "
                f"than the crop of {self.layer.crop}"
            )
        return pixels

    def _checked(self, number: int, pixels: Pixels) -> Pixels:
        """Refuse an image that does not go into a batch with the first one."""
        self._fitting(number, pixels)
        same_size = self.layer.crop and self.layer.mean_file is None
        if pixels.shape[2] != self.shape[3] or not (same_size or pixels.shape == self.stored_shape):
            sizes = ["x".join(map(str, shape)) for shape in (pixels.shape, self.stored_shape)]
            raise UserError(
                f"{self._place(number)}: its image is {sizes[0]} (height x width x channels), the first one "
                f"{sizes[1]}: make the LMDB with one size"
            )
        if pixels.dtype != self.dtype:
            kinds = [
                "8-bit" if dtype == np.uint8 else f"of {dtype} numbers"
                for dtype in (pixels.dtype, self.dtype)
            ]
            raise UserError(
                f"{self._place(number)}: its image is {kinds[0]}, the first one {kinds[1]}: make it anew"
            )
        return pixels

    def _place(self, number: int) -> str:
        return record_place(self.records.folder, self.records.key(number))


def _decode(datum: Any, colour: bool | None, where: str) -> Pixels:
    """A Datum's image, height x width x channels; blue, green, red where it is a colour photograph."""
    if not datum.encoded:
        shape = (datum.channels, datum.height, datum.width)
        flat: Pixels = (
            np.frombuffer(datum.data, np.uint8) if datum.data else np.asarray(datum.float_data, np.float32)
        )
        if flat.size != np.prod(shape) or not flat.size:
            raise UserError(f"{where}: holds {flat.size} numbers for an image of {'x'.join(map(str, shape))}")
        image: Pixels = flat.reshape(shape).transpose(1, 2, 0)
        return image
    import cv2

    # As stored, without turning it by its EXIF data: what Caffe does, too.
    flag = {None: cv2.IMREAD_UNCHANGED, True: cv2.IMREAD_COLOR, False: cv2.IMREAD_GRAYSCALE}[colour]
    try:
        pixels = cv2.imdecode(np.frombuffer(datum.data, np.uint8), flag)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise UserError(f"{where}: its image cannot be decoded: make the LMDB again")
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
