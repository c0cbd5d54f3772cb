"""Whether two networks compute the same scores, found by computing them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.inference.backends import open_backend
from caffe_jacinto.inference.network import trained_network

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_IMAGES, _SEED = 8, 1


def largest_difference(one: tuple[Path, Path], other: tuple[Path, Path]) -> tuple[str, float]:
    """What computed the scores of two networks, and their largest difference over the largest score.

    The networks are deploy prototxts with their weights; a softmax at the end is left out. The images have
    random pixels from 0 to 255.

    Raises:
        UserError: as `trained_network` and `open_backend`; the images or the classes are not as many.
        RunFailed: a network cannot be computed.
    """
    import numpy as np

    networks = [trained_network(*files) for files in (one, other)]
    if networks[0].shape != networks[1].shape:
        raise UserError(f"{other[0]}: takes other images than {one[0]}")
    random = np.random.default_rng(_SEED)
    images = random.uniform(0, 255, (_IMAGES, *networks[0].shape)).astype(np.float32)
    scores: list[NDArray[np.float32]] = []
    for network in networks:
        backend = open_backend(None, network, None)
        scores.append(backend.scores(images))
    if scores[0].shape != scores[1].shape:
        raise UserError(f"{other[0]}: has other classes than {one[0]}")
    largest = max(float(np.abs(scores[0]).max()), float(np.finfo(np.float32).tiny))
    return backend.label, float(np.abs(scores[0] - scores[1]).max()) / largest
