"""Frozen zeros: which weights of the convolutions are held at zero, and the ramp's place, with a snapshot.

Snapshot file ``<prefix>_iter_N.masks.npz``: a NumPy archive of plain arrays, ``factor`` and, under
``frozen/<layer>``, one bit a weight (1: free), rows of the flattened blob.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import write_whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Weights = Mapping[str, NDArray[np.float32]]

MASKS_SUFFIX = ".masks.npz"
_LAYER = "frozen/"


class Masks:
    """What is frozen in each layer: float32 arrays of the weights' shapes, 0 where frozen, 1 where free."""

    def __init__(self, free: dict[str, NDArray[np.float32]] | None = None) -> None:
        self.free = free or {}

    def freeze_zeros(self, weights: Weights) -> None:
        """Freeze every weight that is zero now."""
        import numpy as np

        self.free = {name: (values != 0).astype(np.float32) for name, values in weights.items()}

    def hold(self, values: Weights) -> None:
        """Set what is frozen to zero, in place (weights, or their gradients)."""
        import numpy as np

        for name, free in self.free.items():
            np.multiply(values[name], free, out=values[name])


def masks_file(snapshot: Path) -> Path:
    """The masks beside a ``.solverstate`` or ``.caffemodel``."""
    return snapshot.with_suffix(MASKS_SUFFIX)


def check_masks_file(snapshot: Path) -> None:
    """Refuse a snapshot whose masks are not there, whole.

    Raises:
        UserError: they are missing, or cut off or changed (by their checksums).
    """
    path = masks_file(snapshot)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be used ({error})") from error
    if damaged:
        raise UserError(f"{path} cannot be used: {damaged} in it is damaged")


def save_masks(snapshot: Path, masks: Masks, factor: float) -> None:
    """Write the masks and the ramp's ``factor`` beside ``snapshot``, whole."""
    import numpy as np

    arrays = {_LAYER + name: np.packbits(free != 0) for name, free in masks.free.items()}
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, factor=np.float64(factor), **arrays)
    write_whole(masks_file(snapshot), content.getvalue())


def load_masks(snapshot: Path, weights: Weights) -> tuple[Masks, float]:
    """The masks beside ``snapshot``, whose ``weights`` these are, and the ramp's factor.

    Raises:
        UserError: they are missing, cut off, or not of these weights.
    """
    import numpy as np

    path = masks_file(snapshot)
    free = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            factor = float(archive["factor"])
            for key in archive.files:
                if not key.startswith(_LAYER):
                    continue
                name = key.removeprefix(_LAYER)
                values = weights[name]
                bits = np.unpackbits(archive[key], count=values.size)
                free[name] = bits.reshape(values.shape).astype(np.float32)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: {snapshot} does not say which zeros were frozen; take an earlier snapshot"
        ) from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be used ({error}); take an earlier snapshot") from error
    moved = sum(int(np.count_nonzero(weights[name][mask == 0])) for name, mask in free.items())
    if moved:
        raise UserError(
            f"{path} is not of {snapshot}: {moved} frozen weights are not zero; take an earlier one"
        )
    return Masks(free), factor
