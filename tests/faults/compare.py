"""A run that was disturbed, beside one that was not."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.engines.snapshots import weights_are_finite
from faults.cases import Broken
from faults.disturbed import STAGES, final_weights

SPARSITY_MARGIN = 0.05
"""Stock Caffe reads its data from the start again after a resume, so that its sparsity differs a little."""

_COMPARED_ZEROS = ("sparse", "finetune")
"""The stages whose zeros are compared."""


def compare(run: Path, undisturbed: Path, *, to_the_bit: bool) -> None:
    """All stages' final weights are complete, and equal; or sparse as they should be.

    Raises:
        Broken: they are not.
    """
    for stage in STAGES:
        path = final_weights(run, stage)
        if stage not in _COMPARED_ZEROS and not path.parent.exists():
            continue  # it was deleted when no later stage needed it any more
        # The solver state of a finished stage may be damaged: nothing needs it any more.
        if not weights_are_finite(path):
            raise Broken(f"the final weights of {stage} are not complete")
        ours, theirs = read_weights(path), read_weights(final_weights(undisturbed, stage))
        if to_the_bit:
            _same_bits(stage, ours, theirs)
        elif not all(np.isfinite(blob).all() for blobs in ours.values() for blob in blobs):
            raise Broken(f"weights of {stage} are not numbers")
        sparsity, expected = _sparsity(ours), _sparsity(theirs)
        if abs(sparsity - expected) > SPARSITY_MARGIN:
            raise Broken(f"the sparsity of {stage} is {sparsity:.3f}, undisturbed {expected:.3f}")
    sparse, fine = (read_weights(final_weights(run, stage)) for stage in _COMPARED_ZEROS)
    for layer in _convolutions(sparse):
        moved = int(np.count_nonzero(fine[layer][0][sparse[layer][0] == 0]))
        if moved:
            raise Broken(f"{moved} zeros of {layer} moved in finetune")


def _same_bits(stage: str, ours: dict[str, list[np.ndarray]], theirs: dict[str, list[np.ndarray]]) -> None:
    if ours.keys() != theirs.keys():
        raise Broken(f"the weights of {stage} have other layers than the undisturbed ones")
    for layer, blobs in ours.items():
        for number, (one, other) in enumerate(zip(blobs, theirs[layer], strict=True)):
            if one.tobytes() != other.tobytes():
                count = int(np.count_nonzero(one != other))
                raise Broken(f"{count} weights of {stage}, layer {layer}, blob {number} differ")


def _convolutions(weights: dict[str, list[np.ndarray]]) -> list[str]:
    return [layer for layer, blobs in weights.items() if blobs and blobs[0].ndim == 4]


def _sparsity(weights: dict[str, list[np.ndarray]]) -> float:
    blobs = [weights[layer][0] for layer in _convolutions(weights)]
    return 1 - sum(np.count_nonzero(blob) for blob in blobs) / sum(blob.size for blob in blobs)
