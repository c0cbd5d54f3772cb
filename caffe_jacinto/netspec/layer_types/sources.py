"""Layers without bottoms: data sets, declared inputs."""

from __future__ import annotations

from caffe_jacinto.netspec.layer_types.base import Dim, LayerType, Shape, Shapes
from caffe_jacinto.prototxt.tree import Message

DATA_PARAMETERS = {
    "Data": "data_param",
    "AnnotatedData": "data_param",
    "ImageData": "image_data_param",
    "WindowData": "window_data_param",
    "HDF5Data": "hdf5_data_param",
    "MemoryData": "memory_data_param",
}
"""The layers that read a data set, and the message with their batch size."""


def _declared(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """Input and DummyData say their shapes themselves."""
    dummy = layer.string("type") == "DummyData"
    parameter = layer.message("dummy_data_param" if dummy else "input_param")
    shapes: list[Shape | None] = [tuple(shape.integers("dim")) for shape in parameter.messages("shape")]
    if not shapes and parameter.has("channels"):
        names = ("num", "channels", "height", "width")
        shapes = [tuple(dims) for dims in zip(*(parameter.integers(name) for name in names), strict=False)]
    return shapes * tops if len(shapes) == 1 else shapes


def _images(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """The images of a data layer: its crop, and the channels where it names them; then the labels."""
    kind = layer.string("type")
    transform = layer.message("transform_param")
    parameter = layer.message(DATA_PARAMETERS[kind])
    batch = parameter.optional_integer("batch_size")
    if kind == "MemoryData":
        return [(batch, *(parameter.integer(name) for name in ("channels", "height", "width"))), (batch,)]
    crop = transform.integer("crop_size")
    height = crop or parameter.integer("new_height") or None
    width = crop or parameter.integer("new_width") or None
    means = len(transform.all("mean_value"))
    channels: Dim = means if means > 1 else None
    if kind == "ImageData":
        channels = 3 if parameter.flag("is_color", True) else 1
    return [(batch, channels, height, width), *[(batch,)] * (tops - 1)]


def _not_known(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    """The datasets of an HDF5 file may have any shape."""
    return [None] * tops


def _parameter(layer: Message, bottoms: Shapes, tops: int) -> Shapes:
    return _parameter_blobs(layer, bottoms)


def _parameter_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    return [tuple(layer.message("parameter_param").message("shape").integers("dim"))]


TYPES: dict[str, LayerType] = {
    "Parameter": LayerType(_parameter, _parameter_blobs, ("values",), bottomless=True),
    **{kind: LayerType(_images, role="data") for kind in DATA_PARAMETERS},
    "HDF5Data": LayerType(_not_known, role="data"),
    "Input": LayerType(_declared, role="data"),
    "DummyData": LayerType(_declared, role="data"),
}
