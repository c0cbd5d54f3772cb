"""Which layers' weights count as sparsity, and which of them the pruning rule takes.

Convolutions count, but for one whose output a softmax reads directly; with ``inner_products`` all
convolutions and all inner products do. The rule takes fewer: see `why_not_pruned`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from caffe_jacinto.common.text import did_you_mean
from caffe_jacinto.netspec.graph import CONVOLUTIONS, counted_layers, groups_of, nodes_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from caffe_jacinto.recipes.model import SparseSettings

MIN_CHANNELS = 32
"""A layer with fewer inputs and fewer outputs than this is not pruned; with one of them fewer, by half."""


@dataclass(frozen=True)
class CountedLayer:
    """A convolution or inner product whose weights count as sparsity."""

    name: str
    shape: tuple[int, ...]
    """Of its weights as they are stored: outputs, inputs / group, kernel."""

    group: int = 1
    learns: bool = True
    """False: training leaves it as it is, and so does pruning."""

    inner_product: bool = False
    transposed: bool = False
    """An inner product whose weights are stored inputs first."""

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def outputs(self) -> int:
        return self.shape[-1 if self.transposed else -2] if self.inner_product else self.shape[0]

    @property
    def inputs(self) -> int:
        """Over all groups."""
        return self.weights // max(self.outputs, 1) if self.inner_product else self.shape[1] * self.group

    def outputs_first(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """A view of weights in the stored shape with the axes outputs, inputs / group, kernel."""
        if not self.inner_product:
            return weights
        matrix = weights.reshape(weights.shape[-2:])  # old files have four axes, the first two of them 1
        return matrix.T if self.transposed else matrix


def find_counted(
    layers: Sequence[Any],
    shape_of: Callable[[str], Sequence[int] | None],
    *,
    inner_products: bool = False,
    frozen: Collection[str] = (),
) -> list[CountedLayer]:
    """The layers of a network that count, in order; ``layers`` are its LayerParameter messages.

    ``shape_of`` gives the shape of a layer's weights, or None where that is not known, which leaves the layer
    out; ``frozen`` are layers that training leaves as they are.
    """
    names = set(counted_layers(nodes_of(layers), inner_products=inner_products))
    found = []
    for layer in layers:
        shape = shape_of(layer.name) if layer.name in names else None
        inner_product = layer.type == "InnerProduct"
        if shape is None or (inner_product and (len(shape) < 2 or math.prod(shape[:-2]) != 1)):
            continue
        found.append(
            CountedLayer(
                layer.name,
                tuple(shape),
                1 if inner_product else groups_of(layer),
                learns=layer.name not in frozen,
                inner_product=inner_product,
                transposed=inner_product and layer.inner_product_param.transpose,
            )
        )
    return found


def why_not_pruned(layer: CountedLayer, sparse: SparseSettings) -> str | None:
    """Why the rule leaves the layer as it is, in a few words; None where it prunes it."""
    if not layer.learns:
        return "frozen"
    if named(layer.name, sparse.skip) or (sparse.layers and not named(layer.name, sparse.layers)):
        return "left out by layers or skip"
    reason = _too_small(layer, sparse.min_kernel, any_width=target_of(layer, sparse) is not None)
    if reason is None and sparse.n_of_m is not None:
        together = sparse.n_of_m[1]
        if (layer.inputs // layer.group) % together:
            return f"input channels that {together} does not divide"
    return reason


def _too_small(layer: CountedLayer, min_kernel: int, *, any_width: bool = False) -> str | None:
    if not layer.inner_product:
        if len(layer.shape) != 4:
            return "not two-dimensional"
        if layer.group >= layer.outputs:
            return "depthwise"
        if min(layer.shape[2:]) < min_kernel:
            return f"kernel smaller than {min_kernel}x{min_kernel}"
    if not any_width and max(layer.inputs, layer.outputs) < MIN_CHANNELS:
        return f"fewer than {MIN_CHANNELS} inputs and outputs"
    return None


def is_halved(layer: CountedLayer, sparse: SparseSettings) -> bool:
    """Whether the rule prunes the layer by half of the schedule's fraction, as one of few channels."""
    apart = sparse.pattern is None and sparse.by != "network" and target_of(layer, sparse) is None
    return apart and min(layer.inputs, layer.outputs) < MIN_CHANNELS


def layer_fraction(layer: CountedLayer, sparse: SparseSettings, factor: float) -> float:
    """The fraction of a pruned layer's weights to zero when the schedule is at ``factor``.

    A layer with a target of its own gets there as the factor gets to the network's, and no further.
    """
    own = target_of(layer, sparse)
    if own is not None:
        return min(factor * own / sparse.target, own)
    return factor / 2 if is_halved(layer, sparse) else factor


def target_of(layer: CountedLayer, sparse: SparseSettings) -> float | None:
    """The layer's own target: that of its name, or else of the first pattern that it matches."""
    if layer.name in sparse.targets:
        return sparse.targets[layer.name]
    return next((own for name, own in sparse.targets.items() if fnmatchcase(layer.name, name)), None)


def named(name: str, patterns: Collection[str]) -> bool:
    """Whether ``patterns`` have the name, or one (``res5*``) that it matches."""
    return name in patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def idle_targets(counted: Sequence[CountedLayer], sparse: SparseSettings) -> Iterator[str]:
    """What is wrong with the rule's ``targets`` that name layers which it leaves as they are."""
    for name in sparse.targets:
        chosen = [
            (layer.name, why_not_pruned(layer, sparse)) for layer in counted if named(layer.name, (name,))
        ]
        if chosen and all(reason for _, reason in chosen):
            layer, reason = chosen[0]
            yield f'"{name}" has no effect: {layer} is not pruned ({reason}); change that, or remove it'


def wrong_names(layers: Sequence[Any], sparse: SparseSettings) -> Iterator[tuple[str, str]]:
    """The names in the rule's settings that no layer of the network has: recipe key, and what is wrong.

    ``layers`` are the network's LayerParameter messages.
    """
    nodes = nodes_of(layers)
    counted = counted_layers(nodes, inner_products=sparse.inner_products)
    for key, names in (("layers", sparse.layers), ("skip", sparse.skip), ("targets", sparse.targets)):
        for name in names:
            if any(named(layer, (name,)) for layer in counted):
                continue
            others = [node for node in nodes if named(node.name, (name,))]
            if any(node.type == "InnerProduct" for node in others):
                yield key, f'"{name}" is an inner product; set inner_products = true, or remove it'
            elif any(node.type in CONVOLUTIONS for node in others):
                yield (
                    key,
                    f'"{name}" feeds the softmax and takes no part; set inner_products = true, or remove it',
                )
            elif others:
                yield key, f'"{name}" is of the type {others[0].type}, which is not pruned; remove it'
            else:
                yield key, f'no layer that counts is called "{name}"; {did_you_mean(name, counted)}'
