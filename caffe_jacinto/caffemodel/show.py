"""What is in a weight file: each blob's shape, zeros and range."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from caffe_jacinto.caffemodel.net_file import NetLayer, open_net
from caffe_jacinto.common.text import Column, Line, show_table
from caffe_jacinto.prototxt.dialects import Dialect

CHUNK = 1 << 16
"""Numbers that are looked at together: they stay in the processor's cache from one look to the next."""

KINDS = {
    "Convolution": ("weights", "bias"),
    "Deconvolution": ("weights", "bias"),
    "InnerProduct": ("weights", "bias"),
    "BatchNorm": ("mean", "variance", "factor", "scale", "bias"),
    "Scale": ("scale", "bias"),
    "Bias": ("bias",),
    "PReLU": ("slope",),
}
"""What the blobs of a layer are, by its type."""


@dataclass(frozen=True)
class BlobFacts:
    """One blob."""

    layer: str
    type: str
    blob: str
    shape: tuple[int, ...]
    count: int
    zeros: int
    smallest: float | None
    """Of the numbers that are finite; None where there are none."""

    largest: float | None
    mean_magnitude: float | None
    not_finite: int
    """Infinite ones and those that are not numbers."""

    @property
    def sparsity(self) -> float:
        return self.zeros / self.count if self.count else 0.0


def blob_facts(path: Path, dialect: Dialect) -> list[BlobFacts]:
    """The facts of every blob in a weight file, in the file's order. One blob is in memory at a time.

    Raises:
        UserError: the file is missing, cut off or no weight file.
    """
    with open_net(path, dialect) as (_, layers):
        return [_facts(layer, index) for layer in layers for index in range(len(layer.blobs))]


def blob_name(layer_type: str, index: int) -> str:
    """What a layer's blob of this number is."""
    names = KINDS.get(layer_type, ())
    return names[index] if index < len(names) else f"blob {index}"


def _facts(layer: NetLayer, index: int) -> BlobFacts:
    import numpy as np

    values = layer.values(index)
    flat = values.reshape(-1)
    zeros = broken = 0
    low, high, total = math.inf, -math.inf, 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, flat.size, CHUNK):
            part = flat[start : start + CHUNK]
            zeros += part.size - int(np.count_nonzero(part))
            # Not a number and infinity both survive this sum, which is much faster than to ask each one.
            if not np.isfinite(magnitude := float(np.abs(part).sum(dtype=np.float64))):
                part = part[np.isfinite(part)]
                broken += min(CHUNK, flat.size - start) - part.size
                magnitude = float(np.abs(part).sum(dtype=np.float64))
            total += magnitude
            if part.size:
                low, high = min(low, float(part.min())), max(high, float(part.max()))
    finite = flat.size - broken
    return BlobFacts(
        layer=layer.name,
        type=layer.type,
        blob=blob_name(layer.type, index),
        shape=values.shape,
        count=flat.size,
        zeros=zeros,
        smallest=low if finite else None,
        largest=high if finite else None,
        mean_magnitude=total / finite if finite else None,
        not_finite=broken,
    )


def show(facts: list[BlobFacts], title: str, out: TextIO) -> None:
    """Write a table; blobs with numbers that are not finite in red."""
    total = sum(fact.count for fact in facts)
    columns = [
        Column("Layer", words=True, total="total"),
        Column("Type", words=True),
        Column("Blob", words=True),
        Column("Shape", words=True),
        Column("Numbers", total=f"{total:,}"),
        Column("Zeros"),
        Column("Smallest"),
        Column("Largest"),
        Column("Mean |w|"),
        Column("Not finite"),
    ]
    lines = [Line(_cells(fact), "red" if fact.not_finite else "") for fact in facts]
    show_table(out, title, columns, lines, sparsity_line(facts))


def sparsity_line(facts: list[BlobFacts]) -> str:
    """Zeros over weights of the convolutions, and what is broken, in words."""
    convolutions = [fact for fact in facts if fact.type == "Convolution" and fact.blob == "weights"]
    zeros, weights = sum(fact.zeros for fact in convolutions), sum(fact.count for fact in convolutions)
    line = f"sparsity of the {len(convolutions)} convolutions: {zeros:,} of {weights:,} weights"
    line = f"{line}, {zeros / weights:.1%}" if weights else "no convolutions"
    broken = sum(fact.not_finite for fact in facts)
    return f"{line}; {broken:,} numbers are not finite" if broken else line


def _cells(fact: BlobFacts) -> list[str]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    return [
        fact.layer,
        fact.type,
        fact.blob,
        "x".join(map(str, fact.shape)) or "scalar",
        f"{fact.count:,}",
        f"{fact.sparsity:.1%}" if fact.zeros else "-",
        number(fact.smallest),
        number(fact.largest),
        number(fact.mean_magnitude),
        f"{fact.not_finite:,}" if fact.not_finite else "-",
    ]


def as_json(facts: list[BlobFacts], name: str) -> str:
    """An object with the file's ``name`` and its ``blobs``."""
    return json.dumps({"name": name, "blobs": [_plain(fact) for fact in facts]}, indent=2)


def as_csv(facts: list[BlobFacts]) -> str:
    """A line for each blob."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [*BlobFacts.__dataclass_fields__, "sparsity"], lineterminator="\n")
    writer.writeheader()
    for fact in facts:
        writer.writerow({**_plain(fact), "shape": "x".join(map(str, fact.shape))})
    return out.getvalue()


def _plain(fact: BlobFacts) -> dict[str, Any]:
    return {**asdict(fact), "sparsity": fact.sparsity}
