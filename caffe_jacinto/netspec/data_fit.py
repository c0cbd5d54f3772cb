"""Networks against the data that they read: crops, labels, and what only the size of the images shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from caffe_jacinto.netspec.graph import layers_in
from caffe_jacinto.netspec.layer_types import DATA_PARAMETERS
from caffe_jacinto.netspec.mistakes import mistakes
from caffe_jacinto.netspec.predictions import Prediction, head_of, parameters_of
from caffe_jacinto.netspec.shapes import FullShape, ImageShape, image_shape, layer_shapes
from caffe_jacinto.prototxt.places import line_of_field
from caffe_jacinto.prototxt.tree import Message

LISTED = ("HDF5Data", "ImageData")
"""Layers whose source is a list of files."""

READ = ("Data", *LISTED)
"""Layers whose data are looked at before a training."""


@dataclass(frozen=True)
class DataSize:
    """What an LMDB, or what a list names, holds."""

    images: int
    """Or rows."""

    shape: tuple[int, ...]
    """Of an item: channels, height and width of the smallest image; of a row of HDF5 any."""

    largest: tuple[int, int]
    """Height and width of the largest image."""

    highest_label: int


@dataclass(frozen=True)
class Reading:
    """A network and what it reads."""

    net: Message
    """With the layers of one phase only."""

    where: str
    """Its file."""

    data: Mapping[str, tuple[str, DataSize]]
    """By the source that a layer names: the path that is read instead, and what is there, where known."""

    crop: int | None = None
    """Pixels; instead of the crop that Data layers have."""

    def size_of(self, layer: Message) -> tuple[str, DataSize] | None:
        """The path and the contents of what a layer reads."""
        return self.data.get(source_of(layer)) if layer.string("type") in READ else None


_INDEX_LABELS = ("Accuracy", "HingeLoss", "InfogainLoss", "MultinomialLogisticLoss", "SoftmaxWithLoss")
"""Layers that take a label as the number of a score. Their second bottom has the labels."""


def settings_of(layer: Message) -> Message:
    """The message in which a layer that reads a data set has its source and batch size."""
    return layer.message(DATA_PARAMETERS.get(layer.string("type"), "data_param"))


def source_of(layer: Message) -> str:
    """The LMDB or list that a layer reads."""
    return settings_of(layer).string("source")


def image_shapes(sizes: Mapping[str, DataSize]) -> dict[str, ImageShape]:
    """Channels, height and width of what holds images, by its path."""
    return {
        path: (size.shape[0], size.shape[1], size.shape[2])
        for path, size in sizes.items()
        if len(size.shape) == 3
    }


def given_shape(layer: Message, size: DataSize | None) -> tuple[int, ...] | None:
    """The shape of an item of the first top of a layer that reads ``size``; None where it is not known."""
    if layer.string("type") == "Data":
        return image_shape(layer, {} if size is None else image_shapes({source_of(layer): size}))
    if size is None or layer.string("type") == "HDF5Data":
        return None if size is None else size.shape
    crop = layer.message("transform_param").integer("crop_size")
    return (size.shape[0], crop, crop) if crop else size.shape


def mistakes_with_data(readings: Sequence[Reading]) -> list[str]:
    """Each mistake in networks that share their weights, as ``FILE:LINE: layer NAME: FIELD: ...``."""
    found: dict[str, None] = {}
    too_high: dict[str, tuple[int, str]] = {}
    for reading in readings:
        found.update(dict.fromkeys(mistakes(reading.net, reading.where, _shapes(reading))))
        for layer in layers_in(reading.net):
            found.update(dict.fromkeys((*_not_an_lmdb(reading, layer), *_of_images(reading, layer))))
        for place, label, message in _labels_beyond_outputs(reading):
            too_high[place] = max(too_high.get(place, (label, message)), (label, message))
    return [*found, *(message for _, message in too_high.values())]


def _shapes(reading: Reading) -> dict[str, FullShape]:
    """What layers that read data give, by their names, where it is known."""
    found: dict[str, FullShape] = {}
    for layer in layers_in(reading.net):
        if layer.string("type") in READ:
            size = reading.size_of(layer)
            shape = given_shape(layer, None if size is None else size[1])
            if shape is not None:
                found[layer.string("name")] = (1, *shape)
    return found


def _not_an_lmdb(reading: Reading, layer: Message) -> Iterator[str]:
    """What a Data layer says of its database; Caffe's own default is LevelDB."""
    data = layer.message("data_param")
    if layer.string("type") == "Data" and data.string("backend", "LEVELDB") != "LMDB":
        what = f"is {data.string('backend')}" if data.has("backend") else "is missing, and LEVELDB by default"
        yield (
            f"{reading.where}:{line_of_field(layer, 'data_param.backend')}: layer {layer.string('name')}: "
            f"data_param.backend: {what}; only LMDBs are read: write backend: LMDB, and make an LMDB if "
            "you have none"
        )


def _of_images(reading: Reading, layer: Message) -> Iterator[str]:
    """What of a layer's crop does not fit its images."""
    found = reading.size_of(layer)
    if found is None or layer.string("type") == "HDF5Data":
        return
    path, size = found
    transform = layer.message("transform_param")
    crop = transform.integer("crop_size")
    if crop:
        crop = reading.crop or crop
    height, width = size.shape[-2:]
    begin = f"{reading.where}:{{}}: layer {layer.string('name')}: transform_param.crop_size:"
    if crop > min(height, width):
        yield (
            f"{begin.format(transform.line_of('crop_size'))} {crop} pixels, and the images in {path} have "
            f"{width}x{height}; make it smaller, or give larger images"
        )
    elif not crop and size.largest != (height, width):
        line = transform.line if transform.place else layer.line
        yield (
            f"{begin.format(line)} missing, and the images in {path} have {width}x{height} to "
            f"{size.largest[1]}x{size.largest[0]} pixels; add it"
        )


def _labels_beyond_outputs(reading: Reading) -> Iterator[tuple[str, int, str]]:
    """Labels that there is no score for: the place of the mistake, the label, the message."""
    layers = layers_in(reading.net)
    labels = {
        layer.strings("top")[1]: reading.size_of(layer) for layer in layers if len(layer.strings("top")) > 1
    }
    for at, item in enumerate(layer_shapes(reading.net, _shapes(reading))):
        bottoms = item.layer.strings("bottom")
        found = labels.get(bottoms[1]) if item.kind in _INDEX_LABELS and len(bottoms) > 1 else None
        if found is None:
            continue
        path, size = found
        head = head_of(layers, Prediction(at, bottoms[0]))
        outputs = None if head is None else parameters_of(head).integer("num_output")
        scores = _classes(item.layer, item.bottoms[0]) or outputs
        ignored = item.layer.message("loss_param").optional_integer("ignore_label")
        if scores is None or size.highest_label < scores or size.highest_label == ignored:
            continue
        if head is not None and outputs == scores:
            place = f"{parameters_of(head).line_of('num_output')}: layer {head.string('name')}: num_output:"
            mend = f"make it {size.highest_label + 1}"
        else:
            place = f"{item.layer.line_of('bottom')}: layer {item.layer.string('name')}: bottom:"
            mend = f"give it {size.highest_label + 1}"
        place = f"{reading.where}:{place}"
        yield (
            place,
            size.highest_label,
            f"{place} {scores} outputs are for labels 0 to {scores - 1}, and the images in {path} have label "
            f"{size.highest_label}; {mend}",
        )


def _classes(layer: Message, scores: FullShape | None) -> int | None:
    """The scores of one label."""
    kind = layer.string("type")
    parameter = layer.message("accuracy_param" if kind == "Accuracy" else "softmax_param")
    axis = parameter.integer("axis", 1)
    return scores[axis] if scores is not None and -len(scores) <= axis < len(scores) else None
