"""Ranges of activations that settle while a network trains, and then stay; and their file beside the weights.

They begin as a calibration's. While they settle, each pass adds to what has been seen, and they are chosen
again each time that the number of passes has doubled, and for the last time when settling ends.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from caffe_jacinto import __version__
from caffe_jacinto.caffemodel.hdf5 import without_suffix
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import parse_json, sha256_of, write_whole
from caffe_jacinto.quantization.grids import Grid, is_range
from caffe_jacinto.quantization.network import Network, output_grid, quantized_outputs
from caffe_jacinto.quantization.ranges import Histogram, Range
from caffe_jacinto.quantization.schemes import RANGE_METHODS, RangeMethod, Scheme

FORMAT = 1
"""Of the file; a program refuses one that it does not know."""

RANGES_SUFFIX = ".ranges.json"

Share = Callable[[list[float]], list[float]]
"""Gives all ranks the numbers of the first."""


class SettlingRanges:
    """The ranges of a network in training."""

    def __init__(self, network: Network, where: str) -> None:
        """``where`` is the network's file, for messages."""
        self._network, self._where = network, where
        self._units = {unit.name: unit for unit in quantized_outputs(network)}
        self._passes = self._chosen_at = 0
        self._seen: dict[str, Range] | None = self._nothing_seen()
        self.chosen: dict[str, tuple[float, float]] = {}
        """The ends of each range, by unit; empty before the calibration."""

        self.grids: dict[str, Grid] = {}
        """By unit."""

    def _nothing_seen(self) -> dict[str, Range]:
        counts = self._network.scheme.activation_ranges != "minmax"
        return {name: Range(histogram=Histogram() if counts else None) for name in self._units}

    @property
    def settling(self) -> bool:
        """Whether they still change."""
        return self._seen is not None

    def __contains__(self, unit: str) -> bool:
        return unit in self._units

    def add(self, unit: str, low: float, high: float, sample: np.ndarray[Any, Any] | None) -> None:
        """Take in what a pass has shown of a unit's output, before it is rounded."""
        assert self._seen is not None
        self._seen[unit].add(low, high, sample)

    def end_pass(self, share: Share) -> None:
        """A pass is over; choose the ranges again if their number has doubled."""
        self._passes += 1
        if self._chosen_at and self._passes >= 2 * self._chosen_at:
            self.choose(share)

    def choose(self, share: Share) -> None:
        """Choose the ranges by all that has been seen.

        Raises:
            UserError: a range is not finite.
        """
        assert self._seen is not None
        self._chosen_at = self._passes
        scheme = self._network.scheme
        ends: list[float] = []
        for name, unit in self._units.items():
            seen = self._seen[name]
            if is_range(seen.low, seen.high):
                bits = self._network.bits_of(unit).activations
                ends += seen.chosen(
                    scheme.activation_ranges, scheme.percentile, bits, power_of_two=scheme.power_of_two
                )
            else:
                ends += [seen.low, seen.high]
        self._take(share(ends))

    def _take(self, ends: list[float]) -> None:
        pairs = list(zip(ends[::2], ends[1::2], strict=True))
        self.chosen = dict(zip(self._units, pairs, strict=True))
        self.grids = {
            name: output_grid(self._network, unit, Range(*self.chosen[name]), self._where)
            for name, unit in self._units.items()
        }

    def settle(self, share: Share) -> None:
        """Choose them for the last time."""
        self.choose(share)
        self._seen = None

    def state(self) -> dict[str, Any]:
        """What a snapshot keeps of them."""
        seen = None
        if self._seen is not None:
            seen = {name: _range_state(found) for name, found in self._seen.items()}
        return {"passes": self._passes, "chosen_at": self._chosen_at, "chosen": self.chosen, "seen": seen}

    def load(self, state: Mapping[str, Any], where: str) -> None:
        """Continue from a snapshot's.

        Raises:
            UserError: it is damaged, or of another network; ``where`` names the file.
        """
        try:
            chosen = {str(name): (float(low), float(high)) for name, (low, high) in state["chosen"].items()}
            seen = state["seen"]
            if not chosen:  # stopped before the calibration was over: it is done again
                return
            if chosen.keys() != self._units.keys() or (seen and seen.keys() != self._units.keys()):
                raise UserError(f"{where}: its ranges are those of other layers; use another snapshot")
            self._passes, self._chosen_at = int(state["passes"]), int(state["chosen_at"])
            self._seen = None if seen is None else {name: _range_of(seen[name]) for name in self._units}
        except (KeyError, TypeError, ValueError, AttributeError, zlib.error):
            raise UserError(f"{where}: its ranges cannot be read; use another snapshot") from None
        self._take([end for name in self._units for end in chosen[name]])


def _range_state(found: Range) -> dict[str, Any]:
    state: dict[str, Any] = {"low": found.low, "high": found.high}
    if found.histogram is not None:
        counts = np.ascontiguousarray(found.histogram.counts, "<i8").tobytes()
        state["span"] = found.histogram.span
        state["counts"] = base64.b64encode(zlib.compress(counts)).decode()
    return state


def _range_of(state: Mapping[str, Any]) -> Range:
    found = Range(float(state["low"]), float(state["high"]))
    if "counts" in state:
        counts = np.frombuffer(zlib.decompress(base64.b64decode(state["counts"])), "<i8").astype(np.int64)
        found.histogram = Histogram(float(state["span"]), counts)
        if counts.shape != Histogram().counts.shape:
            raise ValueError("counts")
    return found


# ------------------------------------------------------------------------------ the file beside the weights


@dataclass(frozen=True)
class TrainedRanges:
    """The ranges that a network was trained with."""

    path: Path
    scheme: str
    bits: Mapping[str, int]
    """Of each unit's output, by its name."""

    ranges: Mapping[str, Range]
    weights_by: tuple[RangeMethod, float | None] = ("minmax", None)
    """How the ranges of weights were chosen in each pass, and their percentile."""

    def for_weights(self, scheme: Scheme) -> Scheme:
        """``scheme`` with the ranges of weights chosen as in the training."""
        method, percentile = self.weights_by
        return replace(scheme, weight_ranges=method, percentile=percentile or scheme.percentile)

    def misfit(self, network: Network) -> str | None:
        """Why ``network`` is not what was trained; None if it is."""
        if network.scheme.name != self.scheme:
            return f"they are for the scheme {self.scheme}"
        if network.scheme.weights_chosen_by != self.weights_by:
            return f"they are for ranges of weights by {_by(self.weights_by)}"
        for unit in quantized_outputs(network):
            bits = network.bits_of(unit).activations
            if unit.name not in self.bits:
                return f"they have none for {unit.name}"
            if self.bits[unit.name] != bits:
                return f"they are for {self.bits[unit.name]} bits of {unit.name}, not for {bits}"
        return None


def ranges_file(weights: Path) -> Path:
    """The file beside a ``.caffemodel``."""
    return without_suffix(weights).with_suffix(RANGES_SUFFIX)


def _by(way: tuple[RangeMethod, float | None]) -> str:
    method, percentile = way
    return method if percentile is None else f"{method} {percentile:g}"


def write_ranges(weights: Path, network: Network, ranges: SettlingRanges) -> None:
    """Write the file beside ``weights``, which are there."""
    method, percentile = network.scheme.weights_chosen_by
    content = {
        "format": FORMAT,
        "program": f"caffe_jacinto {__version__}",
        "weights": weights.name,
        "sha256": sha256_of(weights),
        "scheme": network.scheme.name,
        "weight_ranges": method,
        "percentile": percentile,
        "outputs": {
            unit.name: {"bits": network.bits_of(unit).activations, "range": list(ranges.chosen[unit.name])}
            for unit in network.units
            if unit.name in ranges.chosen
        },
    }
    write_whole(ranges_file(weights), json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_ranges(weights: Path) -> TrainedRanges | None:
    """The ranges beside ``weights``; None where there are none.

    Raises:
        UserError: they are damaged, or of other weights.
    """
    path = ranges_file(weights)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        record = parse_json(content)
        if record["format"] != FORMAT:
            raise UserError(f"{path}: format {record['format']!r} is not {FORMAT}; {_REMEDY}")
        outputs = record["outputs"]
        found = TrainedRanges(
            path,
            str(record["scheme"]),
            {str(name): int(output["bits"]) for name, output in outputs.items()},
            {str(name): _read_range(output["range"]) for name, output in outputs.items()},
            _weights_by(record),
        )
        checksum = str(record["sha256"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: damaged, or of another program; {_REMEDY}") from None
    if checksum != sha256_of(weights):
        raise UserError(f"{path}: its ranges are of other weights than {weights.name}; {_REMEDY}")
    return found


_REMEDY = "train the stage again, or remove the file to calibrate"


def has_ranges(weights: Path) -> bool:
    """Whether there are ranges of exactly these weights."""
    try:
        return read_ranges(weights) is not None
    except UserError:
        return False


def carry_ranges(weights: Path, others: Path) -> Path | None:
    """Write the ranges of ``weights`` beside ``others``, too, whose network has the same units and outputs.

    Returns the file; None where there are no ranges of exactly these weights.
    """
    path = ranges_file(others)
    if not has_ranges(weights):
        path.unlink(missing_ok=True)  # those of earlier weights of this name
        return None
    content = parse_json(ranges_file(weights).read_bytes())
    content |= {"weights": others.name, "sha256": sha256_of(others)}
    write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def _weights_by(record: Mapping[str, Any]) -> tuple[RangeMethod, float | None]:
    method, percentile = record.get("weight_ranges", "minmax"), record.get("percentile")
    if method not in RANGE_METHODS or (method == "percentile") != (percentile is not None):
        raise ValueError("weight_ranges")
    return method, None if percentile is None else float(percentile)


def _read_range(pair: Any) -> Range:
    low, high = map(float, pair)
    if not (isfinite(low) and isfinite(high) and low <= high):
        raise ValueError("range")
    return Range(low, high)
