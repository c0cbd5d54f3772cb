"""The networks that can be built, by name; a new one is a file beside this one, and one line here."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from importlib import import_module

from caffe_jacinto.errors import UserError
from caffe_jacinto.networks.layers import Network
from caffe_jacinto.networks.sizes import check_crop

NETWORKS = (
    "bvlc_alexnet",
    "jacintonet11",
    "resnet10",
)
"""Each is a file and the function in it of the same name, which is called with the number of classes and the
crop's size in pixels; one with a third parameter ``strides`` can be given those, too."""

PUBLISHED_WITH_THE_FORK = ("jacintonet11",)
"""The networks that were published with caffe-jacinto; the others come from stock Caffe."""


def build_network(
    name: str, num_classes: int, crop_size: int, strides: tuple[int, ...] | None = None
) -> Network:
    """The network ``name``, with its published strides where none are given.

    Raises:
        UserError: no such network, or it cannot be built with these parameters.
    """
    if name not in NETWORKS:
        nearest = difflib.get_close_matches(name, NETWORKS, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise UserError(f"{name}: no such network; {hint}known: {', '.join(NETWORKS)}")
    if num_classes < 2 or crop_size < 1:
        raise UserError(
            f"{name} with {num_classes} classes and a crop of {crop_size} pixels cannot be built; "
            "give at least 2 classes and 1 pixel"
        )
    build = _builder(name)
    if strides is None:
        network = build(num_classes, crop_size)
    elif takes_strides(name):
        network = build(num_classes, crop_size, strides=strides)
    else:
        raise UserError(f"strides {','.join(map(str, strides))}: those of {name} are fixed; give none")
    check_crop(network)
    return network


def takes_strides(name: str) -> bool:
    """Whether the network ``name`` leaves its strides open."""
    return "strides" in inspect.signature(_builder(name)).parameters


def _builder(name: str) -> Callable[..., Network]:
    build: Callable[..., Network] = getattr(import_module(f"caffe_jacinto.networks.{name}"), name)
    return build
