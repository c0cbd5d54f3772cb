"""Trained layers of forks as layers of stock Caffe, where it has any that compute the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.prototxt.dialects import scale_name
from caffe_jacinto.prototxt.forks import DEPTHWISE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Part = tuple[Any, list[NDArray[np.float32]]]
    """A LayerParameter message and its blobs."""


def in_stock_form(message: Any, blobs: list[NDArray[np.float32]], where: str) -> list[Part]:
    """The layer ``message`` in stock Caffe's form, or as it is where stock Caffe cannot compute it.

    ``message`` is of the dialect bvlc, ``where`` the file's name, for messages.

    Raises:
        UserError: a BN layer whose output depends on the other images of a batch.
    """
    if message.type in DEPTHWISE:
        message.type = "Convolution"
        message.convolution_param.group = message.convolution_param.num_output
    elif message.type == "ReLU6":
        message.type = "Clip"
        message.clip_param.min, message.clip_param.max = 0, 6
    elif message.type == "Pooling" and message.pooling_param.HasField("ceil_mode"):
        if not message.pooling_param.ceil_mode:
            message.pooling_param.round_mode = type(message.pooling_param).FLOOR
        message.pooling_param.ClearField("ceil_mode")
    elif message.type == "BN" and blobs:
        return _batch_norm(message, [blob.reshape(-1) for blob in blobs], where)
    return [(message, blobs)]


def _batch_norm(message: Any, blobs: list[NDArray[np.float32]], where: str) -> list[Part]:
    import numpy as np

    scale = type(message)(name=message.name, type="Scale", bottom=message.bottom, top=message.top)
    scale.scale_param.bias_term = True
    if len(blobs) == 2:
        if message.bn_param.bn_mode != type(message.bn_param).INFERENCE:
            raise UserError(
                f"{where}: layer {message.name} (BN) has bn_mode: LEARN, so it takes its statistics from each"
                " batch of images; fold those of the training set into its blobs and set bn_mode: INFERENCE"
            )
        return [(scale, blobs)]
    norm = type(message)(name=message.name, type="BatchNorm", bottom=message.bottom, top=message.top)
    norm.batch_norm_param.eps = message.bn_param.eps
    scale.name, scale.bottom[:] = scale_name(message.name), message.top
    return [(norm, [*blobs[2:], np.ones(1, np.float32)]), (scale, blobs[:2])]
