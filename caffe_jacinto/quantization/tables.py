"""The figures of a quantization as text, CSV and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import fields
from math import isinf
from typing import TYPE_CHECKING, Any, TextIO

from caffe_jacinto.common.text import Column, Line, show_table
from caffe_jacinto.quantization.results import Result, Row, reach, rows_of
from caffe_jacinto.quantization.schemes import TRAINED
from caffe_jacinto.quantization.units import Unit

if TYPE_CHECKING:
    from caffe_jacinto.quantization.ranges import Histogram

TABLE = "table.txt"
"""The file of `write_text`."""

PICTURES = (".png", ".svg")

MOST_DRAWN = 6
"""Layers in the picture: those with the most noise in their output."""


def write_text(result: Result, out: TextIO) -> None:
    """The accuracies and the layers."""
    _write_accuracy(result, out)
    _write_layers(result, out)


def _write_accuracy(result: Result, out: TextIO) -> None:
    if result.before is None or result.after is None:
        return
    before, after = result.before, result.after
    pairs = [(before.top1, after.top1)]
    columns = [Column("", words=True), Column("Top-1")]
    if before.top5 is not None and after.top5 is not None:
        pairs.append((before.top5, after.top5))
        columns.append(Column("Top-5"))
    lines = [
        Line(("float", *(f"{100 * old:.2f} %" for old, _ in pairs))),
        Line(("quantized", *(f"{100 * new:.2f} %" for _, new in pairs))),
        Line(("change", *(f"{100 * (new - old):+.2f}" for old, new in pairs))),
    ]
    same = f"{100 * (result.agreement or 0):.2f} % of them keep their best class"
    show_table(out, "Accuracy", columns, lines, f"{before.images:,} images; {same}", "")


def _write_layers(result: Result, out: TextIO) -> None:
    scheme = result.network.scheme
    columns = [
        Column("Layer", words=True),
        Column("Weights: bits"),
        Column("largest"),
        Column("scale", words=True),
        Column("zeros"),
        Column("SQNR"),
        Column("Output: bits"),
        Column("range", words=True),
        Column("scale"),
        Column("SQNR"),
    ]
    if result.alone:
        columns.append(Column("Top-1 alone"))
    rows = rows_of(result)
    lines = [Line(_cells(row, with_alone=bool(result.alone))) for row in rows]
    ranges = f"calibrated on {result.calibrated_on:,} images"
    if scheme.activation_ranges == TRAINED:
        ranges = "with the ranges that the training fixed"
    title = f"Scheme {scheme.name}, {ranges}"
    note = (
        "SQNR: signal-to-quantization-noise ratio in dB; of outputs over "
        f"{result.noise_images:,} images, with the noise of the layers before"
    )
    notes = [note]
    if result.alone:
        notes.append("Top-1 alone: the change of top-1 when this layer alone is quantized")
    show_table(out, title, columns, lines, *notes)


def _cells(row: Row, *, with_alone: bool) -> list[str]:
    scales = ""
    if row.weight_scales is not None:
        low, high = row.weight_scales
        scales = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    cells = [
        row.layer,
        _shown(row.weight_bits, "d"),
        _shown(row.weight_range, ".3g"),
        scales or "-",
        "-" if row.zeros is None else f"{100 * row.zeros:.1f} %",
        _decibels(row.weight_decibels),
        _shown(row.output_bits, "d"),
        "-" if row.low is None or row.high is None else f"{row.low:.3g} to {row.high:.3g}",
        _shown(row.output_scale, ".3g"),
        _decibels(row.output_decibels),
    ]
    if with_alone:
        cells.append("-" if row.top1_alone is None else f"{100 * row.top1_alone:+.2f}")
    return cells


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _decibels(value: float | None) -> str:
    if value is None:
        return "-"
    return "exact" if isinf(value) else f"{value:.1f}"


_COLUMNS = [field.name for field in fields(Row) if field.name != "weight_scales"]


def csv_text(result: Result) -> str:
    """A row for each layer, with full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_COLUMNS, "weight_scale_least", "weight_scale_largest"])
    for row in rows_of(result):
        cells = [getattr(row, name) for name in _COLUMNS]
        writer.writerow(
            ["" if cell is None else cell for cell in (*cells, *(row.weight_scales or (None, None)))]
        )
    return out.getvalue()


def worst_units(result: Result) -> list[Unit]:
    """The units with the most noise in their output, the worst first."""
    found = []
    for unit in result.network.units:
        energy = result.noise.get(unit.name)
        decibels = energy.decibels if energy is not None else None
        if decibels is not None and not isinf(decibels) and unit.name in result.quantization.outputs:
            found.append((decibels, unit))
    return [unit for _, unit in sorted(found, key=lambda pair: pair[0])[:MOST_DRAWN]]


def picture(result: Result, kind: str) -> bytes:
    """The values of the worst layers' outputs and the ranges that are quantized, as ``png`` or ``svg``."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    units = worst_units(result)
    settings: Any = {"svg.hashsalt": "caffe_jacinto", "svg.fonttype": "none", "text.parse_math": False}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(10, 2.6 * max((len(units) + 1) // 2, 1)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(max((len(units) + 1) // 2, 1), 2, squeeze=False).flatten()
        for place, unit in zip(axes, units, strict=False):
            _draw(place, result, unit)
        for place in axes[len(units) :]:
            place.set_visible(False)
        content = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(content, format=kind, dpi=120, metadata=metadata)
    return content.getvalue()


def _draw(axes: Any, result: Result, unit: Unit) -> None:
    import numpy as np

    histogram: Histogram | None = result.ranges[unit.name].histogram
    assert histogram is not None, "the picture needs histograms"
    used = np.flatnonzero(histogram.counts)
    first, last = int(used[0]), int(used[-1]) + 1
    width = max((last - first) // 200, 1)
    counts = histogram.counts[first:last]
    starts = np.arange(0, len(counts), width)
    axes.fill_between(
        histogram.centres[first:last][starts], np.add.reduceat(counts, starts), step="mid", color="#4477aa"
    )
    axes.set_yscale("log")
    for end in reach(result.quantization.outputs[unit.name]):
        axes.axvline(end, color="#cc3311", linewidth=1)
    decibels = result.noise[unit.name].decibels
    bits = result.network.bits_of(unit).activations
    axes.set_title(f"{unit.name}: {bits} bits, {decibels:.1f} dB", fontsize=9)
    axes.tick_params(labelsize=8)


def sensitive(rows: Sequence[Row]) -> list[Row]:
    """The layers that cost accuracy when quantized alone, the worst first."""
    found = [row for row in rows if row.top1_alone is not None and row.top1_alone < 0]
    return sorted(found, key=lambda row: row.top1_alone or 0)
