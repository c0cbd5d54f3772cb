"""Layers that work channel by channel, and the convolutions and inner products that can take them in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.netspec.graph import Node, nodes_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from caffe_jacinto.export.stock_net import StockLayer

    Doubles = NDArray[np.float64]

WEIGHTED = ("Convolution", "InnerProduct")
"""What can take in a layer before it."""

SCALED = (*WEIGHTED, "Deconvolution")
"""What can take in a layer behind it."""


def graph(layers: list[StockLayer]) -> list[Node]:
    """The nodes of ``layers``, in order."""
    return nodes_of(layer.message for layer in layers)


def by_channel(layer: StockLayer) -> bool:
    """Whether ``layer`` has one input, and one number of its own per channel."""
    if len(layer.message.bottom) != 1 or not layer.blobs:
        return False
    if layer.type == "BatchNorm":
        return True
    parameters = layer.message.scale_param if layer.type == "Scale" else layer.message.bias_param
    return bool(parameters.axis == 1 and parameters.num_axes == 1)


def gain_and_shift(layer: StockLayer) -> tuple[Doubles, Doubles]:
    """The factor by which a BatchNorm, Scale or Bias multiplies each channel, and what it then adds."""
    import numpy as np

    values = [blob.reshape(-1).astype(np.float64) for blob in layer.blobs]
    if layer.type == "BatchNorm":
        gain = 1 / np.sqrt(values[1] + layer.message.batch_norm_param.eps)
        return gain, -values[0] * gain
    if layer.type == "Bias":
        return np.ones_like(values[0]), values[0]
    return values[0], values[1] if len(values) > 1 else np.zeros_like(values[0])


def along_channels(layer: StockLayer) -> bool:
    """Whether axis 1 of what a convolution or inner product gives has a place for each of its outputs."""
    return bool(_parameters(layer).axis == 1 and layer.blobs)


def bias_of(layer: StockLayer) -> Doubles | int:
    """The bias of a convolution or inner product; 0 where it has none."""
    import numpy as np

    return layer.blobs[1].reshape(-1).astype(np.float64) if len(layer.blobs) > 1 else 0


def set_bias(layer: StockLayer, bias: Doubles) -> None:
    """Give a convolution or inner product this bias."""
    import numpy as np

    _parameters(layer).bias_term = True
    layer.blobs[1:] = [bias.astype(np.float32)]


def _parameters(layer: StockLayer) -> Any:
    inner = layer.type == "InnerProduct"
    return layer.message.inner_product_param if inner else layer.message.convolution_param


def check_finite(layer: StockLayer, taken: StockLayer, weights: Path) -> None:
    """Check ``layer`` after ``taken`` was merged into it.

    Raises:
        UserError: weights of ``layer`` are not finite; ``weights`` is their file.
    """
    import numpy as np

    # An infinite variance would make finite weights: zeros.
    if not all(np.isfinite(blob).all() for blob in (*layer.blobs, *taken.blobs)):
        raise UserError(
            f"{weights}: {layer.name} with {taken.name} ({taken.type}) has weights that are not finite; the "
            "training went wrong, use an earlier snapshot"
        )
