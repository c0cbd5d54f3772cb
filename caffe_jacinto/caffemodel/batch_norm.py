"""The statistics of a trained BatchNorm layer, in the forms of both Caffes.

Stock Caffe stores sums of means and variances, and as the third blob their factor: the statistics are the
sums divided by it. The fork and NVCaffe store plain averages and pass over the factor. Where stock Caffe's
factor is 0, the layer has not seen an image. What Caffe then computes (with averages of 0, it divides by the
square root of eps) has no meaning, and must not be folded into other weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.common.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]

_MOST_NAMES = 5
"""Layers that a message names."""


def averages(mean: Values, variance: Values, factor: float) -> tuple[Values, Values]:
    """Mean and variance of stock Caffe's BatchNorm; as in Caffe, with a factor of 0 both are 0."""
    import numpy as np

    if factor == 0:
        return np.zeros_like(mean), np.zeros_like(variance)
    if factor == 1:
        return mean, variance
    inverse = np.float32(1) / np.float32(factor)  # in this order, as Caffe rounds
    return mean * inverse, variance * inverse


def lacks_statistics(blobs: Sequence[Values], *, plain: bool) -> bool:
    """Whether a BatchNorm with the ``blobs`` has not seen an image; ``plain``: they are plain averages."""
    if plain:
        return not (blobs[0].any() or blobs[1].any())
    return bool(blobs[2].size == 1 and blobs[2].reshape(-1)[0] == 0)


def require_statistics(weights: Path, lacking: Mapping[str, Sequence[Values]]) -> None:
    """Raise `UserError` where layers of ``weights`` lack statistics: their blobs by their names."""
    if not lacking:
        return
    others = len(lacking) - _MOST_NAMES
    names = ", ".join([*list(lacking)[:_MOST_NAMES], *([f"{others} others"] if others > 0 else [])])
    if any(blob.any() for blobs in lacking.values() for blob in blobs[:2]):
        raise UserError(
            f"{weights}: batch norms with a factor of 0 beside means and variances: {names}; if NVCaffe wrote"
            f" them, write the factor first: python -m caffe_jacinto.weights convert {weights} --from"
            " caffe_jacinto --to bvlc --output NEW"
        )
    raise UserError(
        f"{weights}: batch norms without statistics, which no training has set: {names}; train the network,"
        " and give a snapshot of that (weights show FILE marks these layers)"
    )
