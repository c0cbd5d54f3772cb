"""How large the blobs of a network are: whether a crop is large enough for it."""

from __future__ import annotations

from dataclasses import replace

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.networks.layers import (
    DATA_BLOB,
    Convolution,
    GlobalAveragePooling,
    InnerProduct,
    MaxPooling,
    Network,
)

LARGEST_CROP = 4096
"""In pixels; beyond it, no larger crop is looked for that a network could take."""


def check_crop(network: Network) -> None:
    """Raises UserError where the network's crop is so small that a layer would have no output."""
    emptied = _first_without_output(network)
    if emptied is None:
        return
    larger = (
        crop
        for crop in range(network.crop_size + 1, LARGEST_CROP)
        if _first_without_output(replace(network, crop_size=crop)) is None
    )
    smallest = next(larger, None)
    hint = f"use a crop of at least {smallest}" if smallest else "give it smaller strides or kernels"
    raise UserError(
        f"{network.name} with a crop of {network.crop_size} pixels: nothing would be left of the image after "
        f"{emptied}; {hint}"
    )


def _first_without_output(network: Network) -> str | None:
    """The first layer whose output would be smaller than a pixel, if one's is.

    Caffe rounds the size of a convolution's output down, and of a pooling's up.
    """
    sizes = {DATA_BLOB: network.crop_size}
    for layer in network.layers:
        size = sizes[layer.bottoms[0]]
        if isinstance(layer, Convolution):
            size = (size + 2 * layer.pad - layer.kernel) // layer.stride + 1
        elif isinstance(layer, MaxPooling):
            size = -((layer.kernel - size) // layer.stride) + 1
        elif isinstance(layer, (GlobalAveragePooling, InnerProduct)):
            size = 1
        if size < 1:
            return layer.name
        sizes[layer.top] = size
    return None
