"""The networks that can be built, by name; a new one is a file beside this one, and one line here."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import import_module

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.networks.layers import BatchNorm, Convolution, InnerProduct, Layer, Network

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
    return network


def takes_strides(name: str) -> bool:
    """Whether the network ``name`` leaves its strides open."""
    return "strides" in inspect.signature(_builder(name)).parameters


def _builder(name: str) -> Callable[..., Network]:
    build: Callable[..., Network] = getattr(import_module(f"caffe_jacinto.networks.{name}"), name)
    return build


WITH_WEIGHTS = (Convolution, InnerProduct, BatchNorm)


def for_finetuning(network: Network, frozen: Iterable[str], head_lr_mult: float) -> Network:
    """``network`` with learning rates of zero in the ``frozen`` layers, and of ``head_lr_mult`` times the
    published ones in its head.

    Raises:
        UserError: a frozen layer is none of the network's, or nothing would be left to learn.
    """
    still = with_batch_norms(network, frozen, "network.frozen")
    head = [layer.name for layer in network.layers if isinstance(layer, (Convolution, InnerProduct))][-1]
    if head in still and head_lr_mult != 1:
        raise UserError(
            f"network.frozen: {head} is the head, whose learning rate network.head_lr_mult multiplies; "
            "remove one of them"
        )
    if still.issuperset(layer.name for layer in _layers_with_weights(network)):
        raise UserError("network.frozen: these are all layers, so that nothing would learn; leave some out")
    multipliers = {head: head_lr_mult, **dict.fromkeys(still, 0.0)}
    return replace(
        network, layers=tuple(_learning(layer, multipliers.get(layer.name, 1.0)) for layer in network.layers)
    )


def with_batch_norms(network: Network, names: Iterable[str], key: str) -> frozenset[str]:
    """The layers ``names`` of ``network``, and the batch norms of the convolutions among them.

    ``key`` says where the names are from.

    Raises:
        UserError: there is no such layer, or it has no weights.
    """
    chosen: set[str] = set()
    for name in names:
        layer = _layer(network, name, key)
        chosen.add(name)
        if isinstance(layer, Convolution):
            chosen.update(norm.name for norm in _batch_norms_of(network, layer))
    return frozenset(chosen)


def stored_names(network: Network, names: Iterable[str]) -> frozenset[str]:
    """Under which names a weight file of either dialect can hold the layers ``names``."""
    chosen = set(names)
    scales = {
        layer.scale_name for layer in network.layers if isinstance(layer, BatchNorm) and layer.name in chosen
    }
    return frozenset(chosen | scales)


def layers_to_name(network: Network, stored: Iterable[str]) -> list[str]:
    """The layers to name so that `stored_names` of them, with their batch norms, covers ``stored``."""
    missing = set(stored)
    named = []
    for layer in _layers_with_weights(network):
        covered = stored_names(network, with_batch_norms(network, [layer.name], ""))
        if layer.name in missing or (missing & covered and isinstance(layer, BatchNorm)):
            named.append(layer.name)
            missing -= covered
    return named


def _learning(layer: Layer, multiplier: float) -> Layer:
    if isinstance(layer, WITH_WEIGHTS) and multiplier != 1:
        return replace(layer, lr_mult=layer.lr_mult * multiplier)
    return layer


def _layers_with_weights(network: Network) -> list[Layer]:
    return [layer for layer in network.layers if isinstance(layer, WITH_WEIGHTS)]


def _layer(network: Network, name: str, key: str) -> Layer:
    known = {layer.name: layer for layer in _layers_with_weights(network)}
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise UserError(
            f"{key}: {name}: no layer with weights of the network {network.name}; {hint}"
            f"known: {', '.join(known)}"
        )
    return known[name]


def _batch_norms_of(network: Network, convolution: Convolution) -> list[BatchNorm]:
    """The batch norm that is the first to read what ``convolution`` writes, if one is."""
    after = network.layers[network.layers.index(convolution) + 1 :]
    reader = next((layer for layer in after if convolution.top in layer.bottoms), None)
    return [reader] if isinstance(reader, BatchNorm) else []
