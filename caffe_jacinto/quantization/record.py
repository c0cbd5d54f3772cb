"""quantization.json: what a processor has to know beside the weights (docs/quantization.md describes it)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np

from caffe_jacinto import __version__
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import parse_json
from caffe_jacinto.quantization.grids import Grid
from caffe_jacinto.quantization.results import Accuracy, Result, Row, rows_of
from caffe_jacinto.quantization.units import Unit

FORMAT = 1
"""Of the file; a program refuses one that it does not know."""

RECORD = "quantization.json"
"""The file's name."""


def record_of(
    result: Result,
    files: Mapping[str, str | None] | None = None,
    preprocessing: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The contents of quantization.json.

    Args:
        files: the names of the files beside it: ``network`` (None: it is not there), ``weights``.
        preprocessing: class names, and how images become the network's input.
    """
    scheme = result.network.scheme
    rows = {row.layer: row for row in rows_of(result)}
    return {
        "format": FORMAT,
        "program": f"caffe_jacinto {__version__}",
        **(files or {}),
        "preprocessing": dict(preprocessing or {}),
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


@dataclass(frozen=True)
class Recorded:
    """A folder that `caffe_jacinto.quantize` has written."""

    scheme: str
    network: Path
    """For stock Caffe."""

    weights: Path
    files: tuple[Path, ...]
    """quantization.json and, if it is there, the network in caffe-jacinto's dialect."""

    preprocessing: Mapping[str, str]
    outputs: Mapping[str, Grid]
    """By the last layer of a unit, or the input's blob."""

    keeping: frozenset[str]
    """The layers whose output keeps the scale of their input."""

    weight_grids: Mapping[str, Grid]
    bias_grids: Mapping[str, Grid]


def read_recorded(folder: Path, network: str) -> Recorded:
    """What the folder's quantization.json says; ``network`` is the name of its prototxt for stock Caffe.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    path = folder / RECORD
    try:
        record = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder that quantize has written") from None
    except ValueError:
        raise UserError(f"{path}: not JSON: it is damaged; quantize again") from None
    try:
        if record["format"] != FORMAT:
            raise UserError(f"{path}: format {record['format']!r} is not {FORMAT}; quantize again")
        units = record["layers"]
        return Recorded(
            str(record["scheme"]),
            folder / network,
            folder / str(record["weights"]),
            (path, *(folder / str(name) for name in [record["network"]] if name is not None)),
            {str(key): str(value) for key, value in record["preprocessing"].items()},
            {(u["layers"] or [u["blob"]])[-1]: _read_grid(u["output"]) for u in units if u["output"]},
            frozenset(name for u in units if u["keeps_scale"] for name in u["layers"]),
            {u["name"]: _read_grid(u["weights"]) for u in units if u.get("weights")},
            {u["name"]: _read_grid(u["bias"]) for u in units if u.get("bias")},
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise UserError(f"{path}: damaged, or of another program; quantize again") from None


_LEAST, _MOST = -(2**31), 2**31 - 1
"""Of the numbers, which have 32 bits at most."""


def _read_grid(record: Mapping[str, Any]) -> Grid:
    low, high = map(float, record["limits"] or (-inf, inf))
    if not low < high or (isfinite(low) and not (low >= _LEAST and high <= _MOST)):
        raise ValueError("limits")
    steps = np.array(record["scale"], np.float32)
    if steps.ndim != 1 or not steps.size or not (np.isfinite(steps) & (steps > 0)).all():
        raise ValueError("scale")
    return Grid(steps, low, high, float(record["zero_point"]), int(record.get("axis", 0)))
