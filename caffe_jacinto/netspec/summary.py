"""A network layer by layer: output shapes, parameters, multiply-accumulates, and what zeros save of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TextIO

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import Column, Line, show_table
from caffe_jacinto.netspec.graph import TEST
from caffe_jacinto.netspec.layer_types import DATA_PARAMETERS, Shape, geometry, role_of, spatial_axes
from caffe_jacinto.netspec.mistakes import geometry_mistakes
from caffe_jacinto.netspec.shapes import DataShapes, LayerCost, LayerShapes, layer_costs, layer_shapes
from caffe_jacinto.prototxt.tree import Message

UNKNOWN = "-"
COLUMNS = ("name", "type", "detail", "output", "parameters", "macs", "share")
WITH_ZEROS = ("sparsity", "macs_left")
_TITLES = {
    "name": "Layer",
    "type": "Type",
    "detail": "",
    "output": "Output",
    "parameters": "Parameters",
    "macs": "MACs",
    "share": "Share",
    "sparsity": "Sparsity",
    "macs_left": "MACs left",
}
_WORDS = ("name", "type", "detail", "output")


@dataclass(frozen=True)
class LayerRow:
    """A layer of the table."""

    name: str
    type: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    shape: tuple[int, ...] | None
    """Of its first output, without the batch; None where the network does not determine it."""

    detail: str
    """What sets it apart, in short: ``3x3 stride 2 group 4``."""

    parameters: int
    """Numbers in its blobs, batch-norm statistics included."""

    macs: int
    """Multiply-accumulates for one crop, of convolutions and inner products."""

    weights: int
    """Of a convolution or inner product, without biases; 0 for other layers."""

    zeros: int | None
    """Weights that are zero in the weight file; None without one."""

    counted: bool
    """Whether its zeros count as sparsity."""

    @property
    def macs_left(self) -> int | None:
        """What is left of `macs` when a zero costs nothing: each weight has the same share of them."""
        if self.zeros is None:
            return None
        return self.macs - self.macs * self.zeros // self.weights if self.weights else self.macs


@dataclass(frozen=True)
class Summary:
    """All layers of a network, for one crop."""

    name: str
    rows: tuple[LayerRow, ...]
    not_loadable: tuple[str, ...] = ()
    """What no Caffe of the network's dialect can load of it, a line each."""

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    @property
    def macs_left(self) -> int | None:
        left = [row.macs_left for row in self.rows]
        return None if any(value is None for value in left) else sum(value or 0 for value in left)

    @property
    def sparsity(self) -> float | None:
        """Zeros over weights of the convolutions that count; None without a weight file."""
        return self._sparsity([row for row in self.rows if row.counted])

    @property
    def sparsity_with_inner_products(self) -> float | None:
        """Zeros over weights of all convolutions and inner products; None without a weight file."""
        return self._sparsity(self.rows)

    def _sparsity(self, rows: Sequence[LayerRow]) -> float | None:
        if self.macs_left is None:
            return None
        return sum(row.zeros or 0 for row in rows if row.weights) / max(sum(row.weights for row in rows), 1)


def summarize(
    net: Message,
    where: str,
    zeros: Mapping[str, int] | None = None,
    data_shapes: DataShapes = (),
) -> Summary:
    """The summary of a deploy, train or val network; without a phase of its own, of its test phase.

    ``where`` names the network's file in messages; ``zeros`` are the weights that are zero, by layer;
    ``data_shapes`` are those of its data layers, where they are known (see `DataShapes`).

    Raises:
        UserError: there are no layers, Caffe stops at one, or the network does not determine its cost.
    """
    if not net.messages("layer"):
        raise UserError(f"{where}: has no layers; give a network's prototxt, not a solver's")
    wrong = next(geometry_mistakes(net, where, data_shapes), None)
    if wrong is not None:
        raise UserError(wrong)
    phase = net.message("state").string("phase", TEST)
    costs = {cost.name: cost for cost in layer_costs(net, data_shapes, phase)}
    shaped = layer_shapes(net, data_shapes, phase)
    rows = tuple(_row(item, shaped, costs, zeros, where) for item in shaped)
    return Summary(net.string("name") or Path(where).stem, rows)


def _row(
    item: LayerShapes,
    shaped: list[LayerShapes],
    costs: Mapping[str, LayerCost],
    zeros: Mapping[str, int] | None,
    where: str,
) -> LayerRow:
    name = item.layer.string("name")
    cost = costs.get(name)
    if cost is not None and (cost.macs is None or cost.weights is None):
        raise UserError(f"{where}: layer {name} ({item.kind}): {_why_unknown(shaped, item)}")
    shape = item.tops[0] if item.tops else None
    return LayerRow(
        name=name,
        type=item.kind,
        bottoms=tuple(item.layer.strings("bottom")),
        tops=tuple(item.layer.strings("top")),
        shape=shape[1:] if shape else None,
        detail=_detail(item),
        parameters=sum(map(_size, item.blobs)),
        macs=(cost.macs or 0) if cost else 0,
        weights=(cost.weights or 0) if cost else 0,
        zeros=zeros.get(name, 0) if zeros is not None else None,
        counted=cost is not None and cost.counted,
    )


def _size(shape: Shape) -> int:
    return prod(dim or 1 for dim in shape)


def _why_unknown(shaped: list[LayerShapes], item: LayerShapes) -> str:
    """The layer from which on sizes are not known, and what to do."""
    if item.bottoms and all(shape is not None for shape in item.bottoms):
        if role_of(item.kind) in ("convolution", "inner product"):
            return f"does not fit its input, of the shape {item.bottoms[0]}; correct one of them"
        return "its cost is not known: only convolutions and inner products are counted"
    culprit = next(other for other in shaped if other is item or any(shape is None for shape in other.tops))
    name, kind = culprit.layer.string("name"), culprit.kind
    if role_of(kind) == "data":
        source = (
            culprit.layer.message(DATA_PARAMETERS[kind]).string("source") if kind in DATA_PARAMETERS else ""
        )
        tried = f", and {source}, which it reads, cannot be read" if source else ""
        return (
            f"layer {name} ({kind}) does not say the images' size{tried}; give it with --input CxHxW, "
            "or give the deploy network"
        )
    if culprit is item:
        return "the size of its input is not known; give the deploy network, with its input's shape"
    return f"the size of its input is not known, since that of layer {name} ({kind}) is not"


def _detail(item: LayerShapes) -> str:
    """Pooling method, kernel, stride, dilation and group, where they are not 1."""
    if role_of(item.kind) not in ("convolution", "pooling"):
        return ""
    pooling = item.layer.message("pooling_param")
    parts = [pooling.string("pool", "MAX")] if item.kind == "Pooling" else []
    if pooling.flag("global_pooling"):
        return " ".join([*parts, "global"])
    source = item.bottoms[0] if item.bottoms else None
    shape = geometry(item.layer, spatial_axes(item.layer, source))
    parts.append("x".join(map(str, shape.kernel)))
    group = item.layer.message("convolution_param").integer("group", 1)
    for name, value in (("stride", shape.stride[0]), ("dilation", shape.dilation[0]), ("group", group)):
        if value > 1:
            parts.append(f"{name} {value}")
    return " ".join(parts)


def show(summary: Summary, out: TextIO) -> None:
    """Write the table, in colour on a terminal; layers without MACs are dimmed."""
    totals = _totals(summary)
    names = _columns(summary)
    columns = [Column(_TITLES[name], name in _WORDS, totals.get(name, "")) for name in names]
    lines = []
    for row in summary.rows:
        cells = _cells(row, summary)
        lines.append(Line([cells[name] for name in names], "" if row.macs else "dim"))
    show_table(out, summary.name, columns, lines, total_line(summary))
    for line in summary.not_loadable:
        print(line, file=out)


def total_line(summary: Summary) -> str:
    """The totals in words."""
    line = (
        f"{summary.parameters / 1e6:.4g} million parameters, {summary.macs / 1e9:.4f} GigaMACs for one crop"
    )
    left = summary.macs_left
    if left is None:
        return line
    return (
        f"{line}, {left / 1e9:.4f} ({left / max(summary.macs, 1):.1%}) of them left when zeros cost nothing; "
        f"sparsity of the convolutions {summary.sparsity:.1%}, with inner products "
        f"{summary.sparsity_with_inner_products:.1%}"
    )


def as_csv(summary: Summary) -> str:
    """A line for each layer, then the totals, with plain numbers; unknown values are empty."""
    out = io.StringIO()
    columns = _columns(summary)
    writer = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in summary.rows:
        figures = _figures(row, summary)
        writer.writerow({**figures, "output": "x".join(map(str, row.shape)) if row.shape else ""})
    total = {"name": "total", "parameters": summary.parameters, "macs": summary.macs, "share": 1}
    writer.writerow({**total, "macs_left": summary.macs_left, "sparsity": summary.sparsity})
    return out.getvalue()


def as_json(summary: Summary) -> str:
    """The same as an object: ``name``, ``layers``, ``parameters``, ``macs``, ``gigamacs`` ..."""
    columns = _columns(summary)
    content: dict[str, Any] = {
        "name": summary.name,
        "parameters": summary.parameters,
        "macs": summary.macs,
        "gigamacs": summary.macs / 1e9,
    }
    if summary.macs_left is not None:
        content |= {"macs_left": summary.macs_left, "sparsity": summary.sparsity}
        content["sparsity_with_inner_products"] = summary.sparsity_with_inner_products
    if summary.not_loadable:
        content["not_loadable"] = summary.not_loadable
    layers = []
    for row in summary.rows:
        figures = {name: value for name, value in _figures(row, summary).items() if name in columns}
        layers.append({**figures, "output": row.shape, "bottoms": row.bottoms, "tops": row.tops})
    return json.dumps({**content, "layers": layers}, indent=2)


def _columns(summary: Summary) -> tuple[str, ...]:
    return COLUMNS if summary.macs_left is None else (*COLUMNS, *WITH_ZEROS)


def _figures(row: LayerRow, summary: Summary) -> dict[str, Any]:
    sparsity = row.zeros / row.weights if row.zeros is not None and row.weights else None
    return {
        "name": row.name,
        "type": row.type,
        "detail": row.detail,
        "parameters": row.parameters,
        "macs": row.macs,
        "share": row.macs / max(summary.macs, 1),
        "sparsity": sparsity,
        "macs_left": row.macs_left,
    }


def _cells(row: LayerRow, summary: Summary) -> dict[str, str]:
    figures = _figures(row, summary)
    sparsity = figures["sparsity"]
    return {
        "name": row.name,
        "type": row.type,
        "detail": row.detail,
        "output": "x".join(map(str, row.shape)) if row.shape else UNKNOWN,
        "parameters": f"{row.parameters:,}" if row.parameters else UNKNOWN,
        "macs": f"{row.macs:,}" if row.macs else UNKNOWN,
        "share": f"{figures['share']:.1%}" if row.macs else UNKNOWN,
        "sparsity": UNKNOWN if sparsity is None else f"{sparsity:.1%}",
        "macs_left": f"{row.macs_left:,}" if row.macs and row.macs_left is not None else UNKNOWN,
    }


def _totals(summary: Summary) -> dict[str, str]:
    found = {
        "name": "total",
        "parameters": f"{summary.parameters:,}",
        "macs": f"{summary.macs:,}",
        "share": "100.0%",
    }
    if summary.macs_left is not None:
        found |= {"sparsity": f"{summary.sparsity:.1%}", "macs_left": f"{summary.macs_left:,}"}
    return found
