"""Functions of each value alone, dropout and softmax."""

from __future__ import annotations

from caffe_jacinto.netspec.layer_types.base import LayerType, Shape, Shapes, channels_of, same
from caffe_jacinto.prototxt.tree import Message


def _prelu_blobs(layer: Message, bottoms: Shapes) -> list[Shape]:
    return [() if layer.message("prelu_param").flag("channel_shared") else (channels_of(bottoms),)]


TYPES: dict[str, LayerType] = {
    "PReLU": LayerType(same, _prelu_blobs, ("slope",), "follower"),
    **{
        kind: LayerType(same, role="follower")
        for kind in (
            *("AbsVal", "BNLL", "Clip", "Dropout", "ELU", "Exp", "Log", "Power", "ReLU"),
            *("Sigmoid", "Swish", "TanH", "Threshold"),
        )
    },
    **{kind: LayerType(same) for kind in ("Quantization", "Softmax")},
}
