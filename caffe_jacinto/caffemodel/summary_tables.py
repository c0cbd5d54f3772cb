"""A network's summary as a table for people, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any, TextIO

from caffe_jacinto.prototxt.complexity import CONVOLUTIONS
from caffe_jacinto.text_table import Column, Line, show_table

if TYPE_CHECKING:
    from caffe_jacinto.caffemodel.summary import LayerRow, Summary

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
