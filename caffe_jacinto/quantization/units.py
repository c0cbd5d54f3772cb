"""What a scheme quantizes: the layers that are computed together, and whether their output is quantized.

A processor computes a convolution and the ReLU after it as one, and only what leaves the two is rounded. So
the layers of a network form units; each has one output, and at most one layer with weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import did_you_mean
from caffe_jacinto.netspec.graph import Node, nodes_of, readers_of_each, writer
from caffe_jacinto.netspec.layer_types import role_of

WEIGHTED = ("Convolution", "Deconvolution", "InnerProduct")
"""The layers whose weights and biases are quantized."""

Output = Literal["quantized", "kept", "float"]
"""Quantized; kept on the grid of its input, since its values are some of the input's; or neither."""

INPUT = "Input"

_CLIPPING = ("ReLU", "ReLU6", "Clip")
"""Of Clip, only one that begins at zero, as ReLU6 does."""

_FOLLOWERS = {
    **dict.fromkeys(WEIGHTED, ("BatchNorm", "Scale", "Bias", *_CLIPPING)),
    "BatchNorm": ("Scale", "Bias", *_CLIPPING),
    "Scale": ("Bias", *_CLIPPING),
    **dict.fromkeys(("Bias", "Power", "Eltwise"), _CLIPPING),
}
"""The layers that a processor computes together with the one before."""

_KEEPING = (
    *(
        "BatchReindex",
        "Crop",
        "Dropout",
        "Filter",
        "Flatten",
        "Permute",
        "Reshape",
        "ShuffleChannel",
        "Slice",
    ),
    *("Split", "Tile"),
)
_ROUNDED = (
    *WEIGHTED,
    *("AbsVal", "BNLL", "BatchNorm", "Bias", "Clip", "Concat", "ELU", "Eltwise", "Exp", "LRN", "Log"),
    *("PReLU", "Pooling", "Power", "ReLU", "ReLU6", "Reduction", "Scale", "Sigmoid", "Swish", "TanH"),
    "Threshold",
)
_LAST = ("Softmax", "ArgMax")
"""What a network may end with; it is not quantized."""

_FORK_ROUNDED = (
    *WEIGHTED,
    *("BatchNorm", "Scale", "Bias", "ReLU", "PReLU", "Pooling", "Eltwise", "Concat"),
)
_FORK_MERGED = {
    **dict.fromkeys(WEIGHTED, ("BatchNorm", "Scale", "ReLU")),
    "BatchNorm": ("Scale", "ReLU"),
    "Scale": ("ReLU",),
}


@dataclass(frozen=True)
class Unit:
    """Layers that are computed together."""

    name: str
    """Of its first layer, or of the network's input."""

    type: str
    layers: tuple[str, ...]
    output: Output
    blob: str
    """Its output."""

    @property
    def weighted(self) -> bool:
        return self.type in WEIGHTED


def units_of(
    layers: Sequence[Any], inputs: Sequence[str], labels: Sequence[str] = (), *, fork: bool, where: str
) -> list[Unit]:
    """The units of a network in the order of computation, its inputs first.

    Args:
        layers: LayerParameter messages of one phase.
        inputs: the blobs of images that come from outside.
        labels: the other blobs that come from outside.
        fork: by the rules of caffe-jacinto's own quantization; else as a processor computes.

    Raises:
        UserError: a layer that the scheme does not know; ``where`` names the network.
    """
    units = [Unit(name, INPUT, (), "quantized", name) for name in inputs]
    units += [Unit(name, INPUT, (), "float", name) for name in labels]
    nodes = nodes_of(layers)
    found = readers_of_each(nodes)
    merged: set[int] = set()
    for at, (node, layer) in enumerate(zip(nodes, layers, strict=True)):
        if at in merged or role_of(node.type) == "data":
            continue
        members = [at]
        rules = _FORK_MERGED if fork else _FOLLOWERS
        while (after := _follower(nodes, layers, found, members[-1], rules)) is not None:
            members.append(after)
        merged.update(members)
        output = _fork_output(nodes, found, members) if fork else _output(node, layer, where)
        blob = nodes[members[-1]].tops[0]
        units.append(Unit(node.name, node.type, tuple(nodes[i].name for i in members), output, blob))
    return units


def unit_named(units: Sequence[Unit], layer: str, option: str) -> Unit:
    """The unit of a layer that a user names with ``option``."""
    for unit in units:
        if layer in (unit.name, *unit.layers):
            return unit
    raise UserError(
        f"{option} {layer}: the network has no such layer; {did_you_mean(layer, [u.name for u in units])}"
    )


def _follower(
    nodes: Sequence[Node],
    layers: Sequence[Any],
    found: Sequence[Sequence[int]],
    at: int,
    rules: dict[str, tuple[str, ...]],
) -> int | None:
    """The layer that is computed together with layer ``at``: the only one that reads its output."""
    if len(found[at]) != 1:
        return None
    after = found[at][0]
    node = nodes[after]
    fits = node.type in rules.get(nodes[at].type, ()) and len(node.bottoms) == len(node.tops) == 1
    is_leaky = node.type == "ReLU" and layers[after].relu_param.negative_slope
    # Messages of caffe-jacinto have no clip_param.
    clips = layers[after].clip_param if node.type == "Clip" and hasattr(layers[after], "clip_param") else None
    if not fits or is_leaky or (clips is not None and clips.min):
        return None
    return after


def _output(node: Node, layer: Any, where: str) -> Output:
    """Whether a processor rounds the output of a unit that begins with this layer."""
    if node.type in _LAST:
        return "float"
    if node.type == "Pooling" and len(node.tops) > 1:
        raise UserError(
            f"{where}: layer {node.name} (Pooling) cannot be quantized: its second top has places, not values"
        )
    keeps = node.type in _KEEPING or (
        node.type == "Pooling" and layer.pooling_param.pool == layer.pooling_param.MAX
    )
    if keeps:
        return "kept"
    if node.type not in _ROUNDED:
        known = ", ".join(sorted((*_ROUNDED, *_KEEPING, *_LAST)))
        raise UserError(
            f"{where}: layer {node.name} ({node.type}) cannot be quantized: no scheme knows this type; "
            f"quantize a network that has other layers in its place; these are known: {known}"
        )
    return "quantized"


def _fork_output(nodes: Sequence[Node], found: Sequence[Sequence[int]], members: Sequence[int]) -> Output:
    """Whether the fork rounds the output of a unit.

    A batch norm or scale that does not come after a convolution, and is followed by one, is merged with that.
    """
    last = members[-1]
    if nodes[last].type not in _FORK_ROUNDED:
        return "float"
    first = nodes[members[0]]
    only_norms = all(nodes[at].type in ("BatchNorm", "Scale") for at in members)
    if only_norms and len(found[last]) == 1 and nodes[found[last][0]].type in WEIGHTED:
        before = writer(nodes, members[0], first.bottoms[0])
        if before is None or nodes[before].type not in WEIGHTED:
            return "float"
    return "quantized"
