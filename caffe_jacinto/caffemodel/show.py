"""The contents of a weight file: shape, zeros and range of each blob, and the sparsity of the network."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from caffe_jacinto.caffemodel.convert import norm_lacks_statistics
from caffe_jacinto.caffemodel.fit import require_fit
from caffe_jacinto.caffemodel.net_file import NetLayer, find_dialect, open_net
from caffe_jacinto.common.text import Column, Line, show_table
from caffe_jacinto.netspec.graph import counted_layers, nodes_of, with_a_source
from caffe_jacinto.netspec.layer_types import blob_name
from caffe_jacinto.netspec.shapes import FullShape
from caffe_jacinto.netspec.summary import Summary, summarize
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.loadable import not_loadable
from caffe_jacinto.prototxt.schema import dialect_of, parse_any_net
from caffe_jacinto.prototxt.tree import tree_of

CHUNK = 1 << 16
"""Numbers examined at a time: they stay in the processor's cache for all that is computed of them."""


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
    """Among the finite numbers; None where there are none."""

    largest: float | None
    mean_magnitude: float | None
    not_finite: int
    """Infinities and NaN."""

    counts: bool
    """Whether its zeros count as the network's sparsity: the weights of most convolutions do."""

    weights: bool
    """Whether it holds the weights of a convolution or inner product; see `graph.counted_layers`."""

    no_statistics: bool
    """Whether it is the factor of a batch norm that has not seen an image."""

    @property
    def sparsity(self) -> float:
        return self.zeros / self.count if self.count else 0.0


class Sparsity(NamedTuple):
    """The zeros among the weights of the layers that count."""

    zeros: int
    weights: int
    layers: int

    @property
    def fraction(self) -> float:
        return self.zeros / max(self.weights, 1)


def blob_facts(path: Path, dialect: Dialect, network: Any | None = None) -> list[BlobFacts]:
    """The facts of every blob in a weight file, in the file's order. One blob is in memory at a time.

    ``network`` is that of an HDF5 file, as for `open_net`.

    Raises:
        UserError: the file is missing, cut off or not a weight file.
    """
    with open_net(path, dialect, network) as (_, layers):
        nodes = nodes_of(layer.header for layer in layers)
        counted = set(counted_layers(nodes))
        weighted = set(counted_layers(nodes, inner_products=True))
        return [
            _facts(
                layer,
                index,
                counts=index == 0 and layer.name in counted,
                weights=index == 0 and layer.name in weighted,
                no_statistics=index == 2 and norm_lacks_statistics(layer, dialect),
            )
            for layer in layers
            for index in range(len(layer.blobs))
        ]


def sparsity(facts: Iterable[BlobFacts], *, inner_products: bool = False) -> Sparsity:
    """The sparsity of a network, as training and the report count it: without or with inner products."""
    counted = [fact for fact in facts if (fact.weights if inner_products else fact.counts)]
    return Sparsity(sum(fact.zeros for fact in counted), sum(fact.count for fact in counted), len(counted))


def summary_with_zeros(
    text: str,
    where: str,
    dialect: Dialect | None = None,
    weights: Path | None = None,
    data_shapes: Callable[[Any], Mapping[str, FullShape]] = lambda net: {},
) -> Summary:
    """The summary of the network ``text``, which messages call ``where``, with the zeros of a weight file.

    ``data_shapes`` finds those that data layers do not state, by their names.

    Raises:
        UserError: the text is not a network, or the weights do not fit it.
    """
    net = with_a_source(parse_any_net(text, where, dialect))
    tree = tree_of(net)
    zeros: dict[str, int] | None = None
    if weights is not None:
        require_fit(weights, net, where)
        zeros = {}
        for fact in blob_facts(weights, find_dialect(weights)):
            zeros.setdefault(fact.layer, fact.zeros)  # of its first blob, the weights
    return replace(
        summarize(tree, where, zeros, data_shapes(net)),
        not_loadable=tuple(not_loadable(tree, dialect_of(net))),
    )


def _facts(layer: NetLayer, index: int, *, counts: bool, weights: bool, no_statistics: bool) -> BlobFacts:
    import numpy as np

    values = layer.values(index)
    flat = values.reshape(-1)
    zeros = broken = 0
    low, high, total = math.inf, -math.inf, 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, flat.size, CHUNK):
            part = flat[start : start + CHUNK]
            zeros += part.size - int(np.count_nonzero(part))
            # NaN and infinity both survive this sum, which is much faster than to test each number.
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
        counts=counts,
        weights=weights,
        no_statistics=no_statistics,
    )


def show(facts: list[BlobFacts], title: str, out: TextIO) -> None:
    """Write the table; in red, numbers that are not finite and batch norms without statistics."""
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
    lines = [Line(_cells(fact), "red" if fact.not_finite or fact.no_statistics else "") for fact in facts]
    lacking = [fact.layer for fact in facts if fact.no_statistics]
    warnings = [f"batch norms without statistics (factor 0): {', '.join(lacking)}"] * bool(lacking)
    show_table(out, title, columns, lines, *warnings, sparsity_line(facts))


def sparsity_line(facts: list[BlobFacts]) -> str:
    """The sparsity, and how many numbers are not finite, in words."""
    types = {fact.type for fact in facts}
    if "" in types and types <= {"", "BatchNorm"}:
        return "the file does not say which layers are convolutions, whose zeros count: --network FILE does"
    found = sparsity(facts)
    line = f"sparsity of the {found.layers} convolutions: {found.zeros:,} of {found.weights:,} weights"
    line = f"{line}, {found.fraction:.1%}" if found.weights else "no convolutions"
    every = sparsity(facts, inner_products=True)
    if every.layers > found.layers:
        line += (
            f"; of all {every.layers} convolutions and inner products: {every.zeros:,} of {every.weights:,}"
        )
        line += f" weights, {every.fraction:.1%}"
    broken = sum(fact.not_finite for fact in facts)
    return f"{line}; {broken:,} numbers are not finite" if broken else line


def _cells(fact: BlobFacts) -> list[str]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    return [
        fact.layer,
        fact.type,
        f"{fact.blob}, no statistics" if fact.no_statistics else fact.blob,
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
    rows = [{**_plain(fact), "shape": "x".join(map(str, fact.shape))} for fact in facts]
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _plain(fact: BlobFacts) -> dict[str, Any]:
    figures = {**asdict(fact), "sparsity": fact.sparsity}
    del figures["counts"], figures["weights"]
    return figures
