"""A network's summary as a table for people, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TextIO

from caffe_jacinto.caffemodel.fit import check_fit
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import Column, Line, show_table
from caffe_jacinto.netspec.blobs import expected_blobs
from caffe_jacinto.netspec.shapes import (
    CONVOLUTIONS,
    DATA_LAYERS,
    LayerCost,
    LayerShapes,
    layer_costs,
    layer_shapes,
)
from caffe_jacinto.prototxt import tree
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_any_net


@dataclass(frozen=True)
class LayerRow:
    """A layer of the table."""

    name: str
    type: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    shape: tuple[int, ...] | None
    """Of its first output, without the batch; None where the text does not say."""

    detail: str
    """What sets it apart, in short: ``3x3, stride 2, group 4``."""

    parameters: int
    """Numbers in its blobs, batch-norm statistics among them."""

    macs: int
    """Multiply-accumulates for one crop, of convolutions and inner products."""

    weights: int
    """Of a convolution or inner product, without biases: what `zeros` are counted among; else 0."""

    zeros: int | None
    """Weights that are zero in the weight file; None without one."""

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


def summarize(text: str, where: str, dialect: Dialect | None = None, weights: Path | None = None) -> Summary:
    """The summary of a deploy, train or val network.

    ``where`` names the text in messages; ``dialect`` None: whichever the text is of. Of several phases in one
    text the test phase counts. ``weights``: a weight file whose zeros are counted.

    Raises:
        UserError: the text is no network, a layer's cost does not follow from it, or the weights do not fit.
    """
    message = parse_any_net(text, where, dialect)
    net = tree.parse(text, where)
    if not net.messages("layer"):
        raise UserError(f"{where}: has no layers; give a network's prototxt, not a solver's")
    if not net.message("state").has("phase"):
        state = tree.Message()
        state.fields.append(("phase", "TEST"))
        net.fields.append(("state", state))
    zeros = _zeros(weights, message) if weights is not None else None
    costs = {cost.name: cost for cost in layer_costs(net)}
    blobs = expected_blobs(message, test=True)
    rows = tuple(_rows(layer_shapes(net), costs, blobs, zeros, where))
    return Summary(net.string("name") or Path(where).stem, rows)


def _rows(
    shaped: list[LayerShapes],
    costs: dict[str, LayerCost],
    blobs: dict[str, list[tuple[int | None, ...]]],
    zeros: dict[str, int] | None,
    where: str,
) -> Iterator[LayerRow]:
    for item in shaped:
        name = item.layer.string("name")
        cost = costs.get(name)
        if cost is not None and (cost.macs is None or cost.weights is None):
            raise UserError(f"{where}: layer {name} ({item.kind}): {_why_unknown(shaped, item)}")
        shape = item.tops[0] if item.tops else None
        yield LayerRow(
            name=name,
            type=item.kind,
            bottoms=tuple(item.layer.strings("bottom")),
            tops=tuple(item.layer.strings("top")),
            shape=shape[1:] if shape else None,
            detail=_detail(item),
            parameters=_parameters(blobs.get(name, []), cost),
            macs=(cost.macs or 0) if cost else 0,
            weights=(cost.weights or 0) if cost else 0,
            zeros=zeros.get(name, 0) if zeros is not None else None,
        )


def _parameters(blobs: list[tuple[int | None, ...]], cost: LayerCost | None) -> int:
    """Numbers in a layer's blobs; its weights as they are counted where their shape does not follow alone."""
    sizes = [prod(dim or 1 for dim in dims) for dims in blobs]
    if sizes and cost is not None and cost.weights is not None:
        sizes[0] = cost.weights
    return sum(sizes)


def _why_unknown(shaped: list[LayerShapes], item: LayerShapes) -> str:
    """The layer before it from which on sizes are not known, and what to do."""
    if item.bottoms and all(shape is not None for shape in item.bottoms):
        if item.kind in (*CONVOLUTIONS, "InnerProduct"):
            return f"does not fit its input, of the shape {item.bottoms[0]}; mend the one or the other"
        return "its cost is not known here; only convolutions and inner products are counted"
    culprit = next(other for other in shaped if other is item or any(shape is None for shape in other.tops))
    name, kind = culprit.layer.string("name"), culprit.kind
    if kind in DATA_LAYERS:
        return f"the images' size does not follow from layer {name} ({kind}); give the deploy network"
    if culprit is item:
        return "the size of its input is not known; give the deploy network, with its input's shape"
    return f"the size of its input is not known, since that of layer {name} ({kind}) is not"


def _detail(item: LayerShapes) -> str:
    """Kernel, stride, pad, group and dilation, where they are not 1 (or 0, for the pad)."""
    field = {
        "Convolution": "convolution_param",
        "Deconvolution": "convolution_param",
        "Pooling": "pooling_param",
    }
    if item.kind not in field:
        return ""
    parameters = item.layer.message(field[item.kind])
    parts = []
    if item.kind == "Pooling":
        parts.append(parameters.string("pool") or "MAX")
    if parameters.flag("global_pooling"):
        return " ".join([*parts, "global"])
    kernel = parameters.integers("kernel_size") or [
        parameters.integer("kernel_h"),
        parameters.integer("kernel_w"),
    ]
    parts.append("x".join(map(str, kernel * 2 if len(kernel) == 1 else kernel)))
    for name in ("stride", "dilation", "group"):
        value = parameters.integer(name, parameters.integer(f"{name}_h", 1))
        if value > 1:
            parts.append(f"{name} {value}")
    return " ".join(parts)


def _zeros(weights: Path, message: Any) -> dict[str, int]:
    """The zeros in the first blob of each layer of a weight file that fits the network.

    One blob's numbers are in memory at a time.
    """
    import numpy as np

    from caffe_jacinto.caffemodel.storage import blob_values, mapped, stored_layers

    wrong = check_fit(weights, message)
    if wrong:
        raise UserError(f"{weights} does not fit the network: {wrong[0]}; give the prototxt of these weights")
    with mapped(weights) as view:
        found = {}
        for layer in stored_layers(view, weights):
            values = blob_values(view, layer.blobs[0])
            found[layer.name] = values.size - int(np.count_nonzero(values))
        return found


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


def show(summary: Summary, out: TextIO) -> None:
    """Write the table, in colour on a terminal; the layers without MACs in grey."""
    totals = _totals(summary)
    names = _columns(summary)
    columns = [Column(_TITLES[name], name in _WORDS, totals.get(name, "")) for name in names]
    lines = []
    for row in summary.rows:
        cells = _cells(row, summary)
        lines.append(Line([cells[name] for name in names], "" if row.macs else "dim"))
    show_table(out, summary.name, columns, lines, total_line(summary))


def total_line(summary: Summary) -> str:
    """The totals in words."""
    line = (
        f"{summary.parameters / 1e6:.4g} million parameters, {summary.macs / 1e9:.4f} GigaMACs for one crop"
    )
    left = summary.macs_left
    if left is None:
        return line
    return (
        f"{line}, {left / 1e9:.4f} ({left / max(summary.macs, 1):.1%}) of them left when zeros cost nothing"
    )


def as_csv(summary: Summary) -> str:
    """A line for each layer, then the totals, with plain numbers; what is not known is empty."""
    out = io.StringIO()
    columns = _columns(summary)
    writer = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in summary.rows:
        figures = _figures(row, summary)
        writer.writerow({**figures, "output": "x".join(map(str, row.shape)) if row.shape else ""})
    total = {"name": "total", "parameters": summary.parameters, "macs": summary.macs, "share": 1}
    writer.writerow({**total, "macs_left": summary.macs_left, "sparsity": _whole_sparsity(summary)})
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
        content |= {"macs_left": summary.macs_left, "sparsity": _whole_sparsity(summary)}
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
        found |= {"sparsity": f"{_whole_sparsity(summary):.1%}", "macs_left": f"{summary.macs_left:,}"}
    return found


def _whole_sparsity(summary: Summary) -> float | None:
    """Zeros over weights of the convolutions, as everywhere; None without a weight file."""
    if summary.macs_left is None:
        return None
    counted = [row for row in summary.rows if row.weights and row.type in CONVOLUTIONS]
    return sum(row.zeros or 0 for row in counted) / max(sum(row.weights for row in counted), 1)
