"""Layers without bottoms."""

from __future__ import annotations

from torch import Tensor

from caffe_jacinto.engines.pytorch.layer_setup import Builder, Forward, LayerSetup, fill


def dummy_data(layer: LayerSetup) -> Forward:
    """Constant tops are made once; others are drawn again for every pass, as in Caffe."""
    layer.takes(0, tops=len(layer.message.top))
    fields = layer.parameters(
        "dummy_data_param", "shape", "data_filler", "num", "channels", "height", "width"
    )
    count = len(layer.message.top)
    if len(fields.shape or fields.num) not in (1, count) or len(fields.data_filler) not in (0, 1, count):
        layer.refuse("dummy_data_param: give one shape and filler, or one for each top")
    shapes = layer.tops
    fillers = list(fields.data_filler) or [type(fields)().data_filler.add()]
    fillers = fillers * count if len(fillers) == 1 else fillers
    generator, device, where = layer.generator, layer.device, layer.where

    def drawn(index: int) -> Tensor:
        return fill(shapes[index], fillers[index], generator, where).to(device)

    constants = {i: drawn(i) for i, filler in enumerate(fillers) if filler.type == "constant"}
    layer.draws = len(constants) < count
    layer.recordable = not layer.draws  # they are drawn on the CPU
    return lambda blobs: tuple(constants[i] if i in constants else drawn(i) for i in range(count))


def parameter(layer: LayerSetup) -> Forward:
    """Its blob, which learns and begins with zeros, is its top."""
    layer.takes(0)
    layer.parameters("parameter_param", "shape")
    layer.blob()
    return lambda blobs: blobs[0]


LAYERS: dict[str, Builder] = {
    "DummyData": dummy_data,
    "Parameter": parameter,
}
