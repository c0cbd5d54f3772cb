"""What `caffe_jacinto.quantize` has written in a run's folder: accuracy before and after, noise by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import parse_json
from caffe_jacinto.logs.discover import STAGE_LOG, Run
from caffe_jacinto.quantization.record import FORMAT, RECORD


@dataclass(frozen=True)
class QuantizedLayer:
    """What rounding does to a layer; a figure that was not measured is None."""

    name: str
    weight_bits: int | None
    weight_decibels: float | None
    """Signal-to-quantization-noise ratio."""
    output_bits: int | None
    output_decibels: float | None
    """With the noise of the layers before."""
    top1_alone: float | None
    """The change of top-1 when only this layer is quantized."""


@dataclass(frozen=True)
class Quantized:
    """A quantization, as its record describes it."""

    run: str
    folder: str
    scheme: str
    images: int
    """That it was calibrated on."""
    tested: int | None
    """Images; None without a test, and then all accuracies."""
    top1: tuple[float, float] | None
    """Before and after; both are shares."""
    top5: tuple[float, float] | None
    agreement: float | None
    layers: list[QuantizedLayer]


def quantized_of(run: Run) -> tuple[list[Quantized], list[str]]:
    """The quantizations in folders inside the run's folder, and why others cannot be read."""
    folders = {stage.log.absolute().parent.parent for stage in run.stages if stage.log.name == STAGE_LOG}
    found, problems = [], []
    for path in sorted(path for folder in folders for path in folder.glob(f"*/{RECORD}")):
        try:
            found.append(_read(run.name, path))
        except UserError as problem:
            problems.append(str(problem))
    return found, problems


def _read(run: str, path: Path) -> Quantized:
    try:
        record = parse_json(path.read_bytes())
        if record["format"] != FORMAT:
            raise UserError(f"{path}: format {record['format']!r} is not {FORMAT}; it is left out")
        accuracy = record["accuracy"]
        return Quantized(
            run=run,
            folder=path.parent.name,
            scheme=str(record["scheme"]),
            images=int(record["calibration_images"]),
            tested=None if accuracy is None else int(accuracy["images"]),
            top1=None if accuracy is None else _before_and_after(accuracy, "top1"),
            top5=None if accuracy is None else _before_and_after(accuracy, "top5"),
            agreement=None if accuracy is None else _number(accuracy["agreement"]),
            layers=[_layer(layer) for layer in record["layers"]],
        )
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is damaged, and left out") from None


def _before_and_after(accuracy: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    before, after = _number(accuracy["float"][name]), _number(accuracy["quantized"][name])
    return None if before is None or after is None else (before, after)


def _layer(record: Mapping[str, Any]) -> QuantizedLayer:
    weights, output = record.get("weights") or {}, record.get("output") or {}
    return QuantizedLayer(
        name=str(record["name"]),
        weight_bits=_whole(weights.get("bits")),
        weight_decibels=_number(record.get("weights_sqnr_db")),
        output_bits=_whole(output.get("bits")),
        output_decibels=_number(record.get("output_sqnr_db")),
        top1_alone=_number(record.get("top1_change_alone")),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)
