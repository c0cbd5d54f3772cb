"""What differs between two weight files, blob by blob."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from caffe_jacinto.caffemodel.net_file import NetLayer, open_net, squeezed
from caffe_jacinto.caffemodel.show import blob_name
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.text_table import Column, Line, show_table


@dataclass(frozen=True)
class Difference:
    """A layer, or one of its blobs, that is not the same in both files."""

    layer: str
    blob: str
    what: str
    """In words, where the numbers cannot be compared; else empty."""

    changed: int = 0
    """How many numbers differ; one that is not a number in both files does not."""

    count: int = 0
    largest: float = 0.0
    """The largest difference between two numbers."""

    relative: float = 0.0
    """That over the largest magnitude in the blob of the first file."""

    zeros_gained: int = 0
    """Numbers that are zero in the second file only."""

    zeros_lost: int = 0
    """Numbers that are zero in the first file only."""


def differences(a: Path, b: Path, dialect_a: Dialect, dialect_b: Dialect) -> tuple[list[Difference], int]:
    """The differences in the order of ``a``'s layers, then those only in ``b``; and how many blobs agree.

    Raises:
        UserError: a file is missing, cut off or no weight file.
    """
    found: list[Difference] = []
    same = 0
    with open_net(a, dialect_a) as (_, layers_a), open_net(b, dialect_b) as (_, layers_b):
        ours = {layer.name: layer for layer in layers_a if layer.blobs}
        theirs = {layer.name: layer for layer in layers_b if layer.blobs}
        for name, layer in ours.items():
            if name not in theirs:
                found.append(Difference(name, "", f"only in {a}"))
            elif len(layer.blobs) != len(theirs[name].blobs):
                counts = f"{len(layer.blobs)} blobs, and {len(theirs[name].blobs)} in {b}"
                found.append(Difference(name, "", counts))
            else:
                compared = [_compare(layer, theirs[name], index) for index in range(len(layer.blobs))]
                found += [difference for difference in compared if difference is not None]
                same += sum(difference is None for difference in compared)
        found += [Difference(name, "", f"only in {b}") for name in theirs if name not in ours]
    return found, same


def _compare(ours: NetLayer, theirs: NetLayer, index: int) -> Difference | None:
    import numpy as np

    name = blob_name(ours.type, index)
    shapes = [layer.blobs[index].shape for layer in (ours, theirs)]
    if squeezed(shapes[0]) != squeezed(shapes[1]):
        first, second = ("x".join(map(str, shape)) for shape in shapes)
        return Difference(ours.name, name, f"{first}, and {second} in the other")
    a, b = ours.values(index).reshape(-1), theirs.values(index).reshape(-1)
    if a.tobytes() == b.tobytes():
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        different = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        changed = int(np.count_nonzero(different))
        if not changed:
            return None
        steps = np.abs(a[different].astype(np.float64) - b[different])
        largest = float(np.nanmax(steps)) if not np.isnan(steps).all() else float("nan")
        magnitude = float(np.nanmax(np.abs(a)))
    return Difference(
        ours.name,
        name,
        "",
        changed=changed,
        count=a.size,
        largest=largest,
        relative=largest / magnitude if magnitude else float("inf"),
        zeros_gained=int(np.count_nonzero((b == 0) & (a != 0))),
        zeros_lost=int(np.count_nonzero((a == 0) & (b != 0))),
    )


def show(found: list[Difference], same: int, out: TextIO) -> None:
    """Write the table of what differs."""
    if not found:
        out.write(f"the same: all {same} blobs agree\n")
        return
    columns = [
        Column("Layer", words=True),
        Column("Blob", words=True),
        Column("", words=True),
        Column("Changed"),
        Column("Largest"),
        Column("Relative"),
        Column("Zeros gained"),
        Column("Zeros lost"),
    ]
    lines = [Line(_cells(item), "yellow" if item.what else "") for item in found]
    show_table(out, "", columns, lines, f"{len(found)} differences; {same} blobs agree")


def _cells(item: Difference) -> list[str]:
    if item.what:
        return [item.layer, item.blob, item.what, "", "", "", "", ""]
    return [
        item.layer,
        item.blob,
        "",
        f"{item.changed:,} of {item.count:,}",
        f"{item.largest:.4g}",
        f"{item.relative:.2g}",
        f"{item.zeros_gained:,}",
        f"{item.zeros_lost:,}",
    ]
