"""quantization.json: what a processor has to know beside the weights (docs/quantization.md describes it)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from typing import Any

from caffe_jacinto import __version__
from caffe_jacinto.quantization.grids import Grid
from caffe_jacinto.quantization.results import Accuracy, Result, Row, rows_of
from caffe_jacinto.quantization.units import Unit

FORMAT = 1
"""Of the file; a program refuses one that it does not know."""

RECORD = "quantization.json"
"""The file's name."""


def record_of(result: Result, files: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The contents of quantization.json; ``files`` are the names of the files beside it."""
    scheme = result.network.scheme
    rows = {row.layer: row for row in rows_of(result)}
    return {
        "format": FORMAT,
        "program": f"caffe_jacinto {__version__}",
        **(files or {}),
        "scheme": scheme.name,
        "settings": {
            "bits": asdict(scheme.bits),
            "activation_ranges": scheme.activation_ranges,
            "weight_ranges": scheme.weight_ranges,
            "percentile": scheme.percentile,
            "bias_correction": scheme.bias_correction,
        },
        "calibration_images": result.calibrated_on,
        "accuracy": _accuracy(result),
        "layers": [_layer(result, unit, rows.get(unit.name)) for unit in result.network.units],
    }


def record_text(record: dict[str, Any]) -> str:
    """As it is written."""
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def _accuracy(result: Result) -> dict[str, Any] | None:
    def shares(accuracy: Accuracy) -> dict[str, Any]:
        return {"top1": accuracy.top1, "top5": accuracy.top5}

    if result.before is None or result.after is None:
        return None
    return {
        "images": result.before.images,
        "float": shares(result.before),
        "quantized": shares(result.after),
        "agreement": result.agreement,
    }


def _layer(result: Result, unit: Unit, row: Row | None) -> dict[str, Any]:
    found, bits = result.quantization, result.network.bits_of(unit)
    record: dict[str, Any] = {
        "name": unit.name,
        "type": unit.type,
        "layers": list(unit.layers),
        "blob": unit.blob,
        "keeps_scale": unit.output == "kept",
    }
    output = found.outputs.get(unit.name)
    record["output"] = None
    if output is not None:
        seen = result.ranges[unit.name]
        record["output"] = {
            **_grid(output, bits.activations),
            "signed": output.signed,
            "seen": [seen.low, seen.high],
        }
    if unit.weighted:
        weights, bias = found.weights.get(unit.name), found.biases.get(unit.name)
        given = found.inputs.get(unit.name)
        record["input_scale"] = given.step if given is not None else None
        record["weights"] = (
            None if weights is None else {**_grid(weights, bits.weights), "axis": weights.axis}
        )
        record["bias"] = None if bias is None else _grid(bias, bits.bias)
    if row is not None:
        record["weights_sqnr_db"] = _finite(row.weight_decibels)
        record["output_sqnr_db"] = _finite(row.output_decibels)
        record["top1_change_alone"] = row.top1_alone
    return record


def _grid(grid: Grid, bits: int) -> dict[str, Any]:
    steps = [float(step) for step in grid.steps.tolist()]
    limits = [int(end) for end in (grid.low, grid.high)] if isfinite(grid.low) else None
    offset: float = int(grid.offset) if grid.offset == int(grid.offset) else grid.offset
    return {"bits": bits, "scale": steps, "zero_point": offset, "limits": limits}


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None
