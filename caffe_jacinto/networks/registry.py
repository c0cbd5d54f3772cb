"""The networks that can be built, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from caffe_jacinto.errors import UserError
from caffe_jacinto.networks.jacintonet11 import jacintonet11
from caffe_jacinto.networks.layers import Network

NETWORKS: dict[str, Callable[[int, int, tuple[int, ...]], Network]] = {
    "jacintonet11": jacintonet11,
}
"""Each is called with the number of classes, the crop's size in pixels and the strides."""


def build_network(name: str, num_classes: int, crop_size: int, strides: tuple[int, ...]) -> Network:
    """The network ``name``.

    Raises:
        UserError: no such network, or it cannot be built with these parameters.
    """
    if name not in NETWORKS:
        nearest = difflib.get_close_matches(name, NETWORKS, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise UserError(f"{name}: no such network; {hint}known: {', '.join(sorted(NETWORKS))}")
    if num_classes < 2 or crop_size < 1:
        raise UserError(
            f"{name} with {num_classes} classes and a crop of {crop_size} pixels cannot be built; "
            "give at least 2 classes and 1 pixel"
        )
    return NETWORKS[name](num_classes, crop_size, strides)
