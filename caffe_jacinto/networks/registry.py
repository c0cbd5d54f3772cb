"""The networks that can be built, by name, and what fine-tuning changes in them.

Adding a network takes one file beside this one and one entry in `NETWORKS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import did_you_mean
from caffe_jacinto.networks.layers import BatchNorm, Convolution, InnerProduct, Layer, Network
from caffe_jacinto.recipes.rules import Mistake, Rule, Values

NETWORKS = (
    "bvlc_alexnet",
    "googlenet",
    "jacintonet11",
    "mobilenet_v1",
    "mobilenet_v2",
    "resnet10",
    "resnet18",
    "resnet50",
    "squeezenet_v1_1",
    "vgg16",
)
"""Each is a function in the module of the same name: from the number of classes and the crop size in pixels
to a `Network`. Third parameters ``strides`` or ``width`` are optional."""

_MODULES = {"resnet18": "resnet", "resnet50": "resnet"}
"""Where a function is in a module of another name."""

PUBLISHED_WITH_THE_FORK = ("jacintonet11",)
"""Networks published with caffe-jacinto; the others were published with stock Caffe."""

WITH_WEIGHTS = (Convolution, InnerProduct, BatchNorm)


def build_network(
    name: str,
    num_classes: int,
    crop_size: int,
    strides: tuple[int, ...] | None = None,
    width: float | None = None,
) -> Network:
    """The network ``name``; without ``strides`` and ``width`` (multiplier), with its published ones.

    Raises:
        UserError: no such network, or it cannot be built with these parameters.
    """
    if name not in NETWORKS:
        raise UserError(f"{name}: no such network; {did_you_mean(name, NETWORKS)}")
    if num_classes < 2 or crop_size < 1:
        raise UserError(
            f"{name} with {num_classes} classes and a crop of {crop_size} pixels cannot be built; "
            "give at least 2 classes and 1 pixel"
        )
    chosen: dict[str, Any] = {}
    if strides is not None:
        if not takes(name, "strides"):
            raise UserError(f"strides {','.join(map(str, strides))}: those of {name} are fixed; give none")
        chosen["strides"] = strides
    if width is not None:
        if not takes(name, "width"):
            raise UserError(f"width {width:g}: that of {name} is fixed; give none")
        chosen["width"] = width
    return _builder(name)(num_classes, crop_size, **chosen)


def _network_exists(recipe: Values) -> Iterator[Mistake]:
    name = recipe["network.name"]
    if recipe["network.prototxt"] is None and name not in NETWORKS:
        yield recipe.mistake("network.name", f"{name}: no such network; {did_you_mean(name, NETWORKS)}")


def _network_can_be_built(recipe: Values) -> Iterator[Mistake]:
    keys = ("name", "crop_size", "strides", "width")
    name, crop, strides, width = (recipe[f"network.{key}"] for key in keys)
    classes = recipe["data.num_classes"]
    if recipe["network.prototxt"] is None and crop is not None and name in NETWORKS:
        try:
            build_network(name, classes, crop, None if strides is None else tuple(strides), width)
        except UserError as error:
            given = [key for key in ("strides", "width") if str(error).startswith(key)]
            yield recipe.mistake(f"network.{given[0] if given else 'name'}", str(error))


RECIPE_RULES: tuple[Rule, ...] = (_network_exists, _network_can_be_built)
"""What a recipe's network has to fulfil, for `load_recipe`."""


def takes(name: str, parameter: str) -> bool:
    """Whether the ``strides`` or the ``width`` of network ``name`` can be chosen."""
    return parameter in inspect.signature(_builder(name)).parameters


def _builder(name: str) -> Callable[..., Network]:
    build: Callable[..., Network] = getattr(
        import_module(f"caffe_jacinto.networks.{_MODULES.get(name, name)}"), name
    )
    return build


def for_finetuning(network: Network, frozen: Iterable[str], head_lr_mult: float) -> Network:
    """``network`` with ``frozen`` layers, and the learning rate of its head times ``head_lr_mult``.

    Raises:
        UserError: the network has no such layer, or nothing would be left to train.
    """
    still = with_batch_norms(network, frozen, "network.frozen")
    head = [layer.name for layer in network.layers if isinstance(layer, (Convolution, InnerProduct))][-1]
    if head in still and head_lr_mult != 1:
        raise UserError(
            f"network.frozen: {head} is the head, whose learning rate network.head_lr_mult multiplies; "
            "remove one of them"
        )
    if still.issuperset(layer.name for layer in _layers_with_weights(network)):
        raise UserError("network.frozen names all layers, so nothing would be trained; leave some out")
    multipliers = {head: head_lr_mult, **dict.fromkeys(still, 0.0)}
    return replace(
        network,
        layers=_all_learning(network.layers, multipliers),
        auxiliary={after: _all_learning(layers, multipliers) for after, layers in network.auxiliary.items()},
    )


def with_batch_norms(network: Network, names: Iterable[str], key: str) -> frozenset[str]:
    """The layers ``names`` of ``network``, and the batch norms of the convolutions among them.

    ``key`` is the recipe's key that the names come from.

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
    """The names under which a weight file of either dialect holds the layers ``names``."""
    chosen = set(names)
    scales = {
        layer.scale_name
        for layer in network.trained_layers
        if isinstance(layer, BatchNorm) and layer.name in chosen
    }
    return frozenset(chosen | scales)


def layers_to_name(network: Network, stored: Iterable[str]) -> list[str]:
    """The fewest layers whose `stored_names`, with their batch norms, cover ``stored``."""
    missing = set(stored)
    named = []
    for layer in _layers_with_weights(network):
        covered = stored_names(network, with_batch_norms(network, [layer.name], ""))
        if layer.name in missing or (missing & covered and isinstance(layer, BatchNorm)):
            named.append(layer.name)
            missing -= covered
    return named


def _all_learning(layers: Iterable[Layer], multipliers: Mapping[str, float]) -> tuple[Layer, ...]:
    return tuple(_learning(layer, multipliers.get(layer.name, 1.0)) for layer in layers)


def _learning(layer: Layer, multiplier: float) -> Layer:
    if isinstance(layer, WITH_WEIGHTS) and multiplier != 1:
        return replace(layer, lr_mult=layer.lr_mult * multiplier)
    return layer


def _layers_with_weights(network: Network) -> list[Layer]:
    return [layer for layer in network.trained_layers if isinstance(layer, WITH_WEIGHTS)]


def _layer(network: Network, name: str, key: str) -> Layer:
    known = {layer.name: layer for layer in _layers_with_weights(network)}
    if name not in known:
        raise UserError(
            f"{key}: {name} is not a layer with weights of the network {network.name}; "
            f"{did_you_mean(name, known)}"
        )
    return known[name]


def _batch_norms_of(network: Network, convolution: Convolution) -> list[BatchNorm]:
    """The batch norm that reads the output of ``convolution`` first, if there is one."""
    layers = network.trained_layers
    after = layers[layers.index(convolution) + 1 :]
    reader = next((layer for layer in after if convolution.top in layer.bottoms), None)
    return [reader] if isinstance(reader, BatchNorm) else []
