"""The differences between two weight files, blob by blob."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from caffe_jacinto.caffemodel.convert import as_fork, norm_averages
from caffe_jacinto.caffemodel.net_file import NetLayer, NewLayer, open_net, require_types
from caffe_jacinto.caffemodel.storage import blob_values
from caffe_jacinto.common.text import Column, Line, show_table
from caffe_jacinto.netspec.layer_types import blob_name
from caffe_jacinto.prototxt.dialects import Dialect

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """A layer, or one of its blobs, that is not the same in both files."""

    layer: str
    blob: str
    what: str
    """In words where the numbers cannot be compared, otherwise empty."""

    changed: int = 0
    """How many numbers differ; two NaN count as the same."""

    count: int = 0
    largest: float = 0.0
    """The largest difference between two numbers."""

    relative: float = 0.0
    """``largest`` over the largest magnitude in the first file's blob."""

    zeros_gained: int = 0
    """Numbers that are zero in the second file only."""

    zeros_lost: int = 0
    """Numbers that are zero in the first file only."""


class _Blob(NamedTuple):
    """A blob to compare."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], Values]


def differences(
    a: Path, b: Path, dialect_a: Dialect, dialect_b: Dialect, network: Any | None = None
) -> tuple[list[Difference], int]:
    """The differences in the order of ``a``'s layers, then those only in ``b``; and how many blobs agree.

    Statistics of batch norms are compared as averages, without the factor that stock Caffe stores them with.
    Where the dialects differ, stock Caffe's file is compared as `convert` would write it for the fork.
    ``network`` is that of HDF5 files, as for `open_net`.

    Raises:
        UserError: a file is missing, cut off or not a weight file, or cannot be converted.
    """
    found: list[Difference] = []
    same = 0
    with open_net(a, dialect_a, network) as (_, layers_a), open_net(b, dialect_b, network) as (_, layers_b):
        ours = _comparable(a, layers_a, dialect_a, dialect_b)
        theirs = _comparable(b, layers_b, dialect_b, dialect_a)
        for name, blobs in ours.items():
            if name not in theirs:
                found.append(Difference(name, "", "only in the first"))
            elif len(blobs) != len(theirs[name]):
                counts = f"{len(blobs)} blobs, and {len(theirs[name])} in the second"
                found.append(Difference(name, "", counts))
            else:
                compared = [_compare(name, *pair) for pair in zip(blobs, theirs[name], strict=True)]
                found += [difference for difference in compared if difference is not None]
                same += sum(difference is None for difference in compared)
        found += [Difference(name, "", "only in the second") for name in theirs if name not in ours]
    return found, same


def _comparable(
    path: Path, layers: list[NetLayer], dialect: Dialect, other: Dialect
) -> dict[str, list[_Blob]]:
    """The blobs of each layer that has any, by its name, as compared with a file in ``other``."""
    if dialect is Dialect.BVLC and other is Dialect.CAFFE_JACINTO:
        require_types(path, layers)
        return {
            layer.header.name: _converted_blobs(layer) for layer in as_fork(path, layers, {}) if layer.blobs
        }
    return {layer.name: _own_blobs(layer, dialect) for layer in layers if layer.blobs}


def _converted_blobs(layer: NewLayer) -> list[_Blob]:
    kind = str(layer.header.type)
    blobs = []
    for index, blob in enumerate(layer.blobs):
        if isinstance(blob, tuple):
            blobs.append(_Blob(blob_name(kind, index), blob[1].shape, partial(blob_values, *blob)))
        elif not _is_factor(kind, index):
            blobs.append(_Blob(blob_name(kind, index), blob.shape, partial(_given, blob)))
    return blobs


def _own_blobs(layer: NetLayer, dialect: Dialect) -> list[_Blob]:
    sizes = [prod(blob.shape) for blob in layer.blobs]
    averaged = layer.type == "BatchNorm" and dialect is Dialect.BVLC and sizes[2:] == [1]
    return [
        _Blob(
            blob_name(layer.type, index),
            blob.shape,
            partial(_average, layer, index) if averaged and index < 2 else partial(layer.values, index),
        )
        for index, blob in enumerate(layer.blobs)
        if not _is_factor(layer.type, index)
    ]


def _is_factor(kind: str, index: int) -> bool:
    return kind == "BatchNorm" and index == 2


def _average(layer: NetLayer, index: int) -> Values:
    return norm_averages(layer)[index]


def _given(values: Values) -> Values:
    return values


def _compare(layer: str, ours: _Blob, theirs: _Blob) -> Difference | None:
    import numpy as np

    if _squeezed(ours.shape) != _squeezed(theirs.shape):
        first, second = ("x".join(map(str, blob.shape)) for blob in (ours, theirs))
        return Difference(layer, ours.name, f"{first}, and {second} in the second")
    a, b = ours.values().reshape(-1), theirs.values().reshape(-1)
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
        layer,
        ours.name,
        "",
        changed=changed,
        count=a.size,
        largest=largest,
        relative=largest / magnitude if magnitude else float("inf"),
        zeros_gained=int(np.count_nonzero((b == 0) & (a != 0))),
        zeros_lost=int(np.count_nonzero((a == 0) & (b != 0))),
    )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the leading 1s of the old form, which always has four axes."""
    kept = list(shape)
    while len(kept) > 1 and kept[0] == 1:
        kept.pop(0)
    return tuple(kept)


def show(found: list[Difference], same: int, out: TextIO) -> None:
    """Write the table of the differences."""
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
