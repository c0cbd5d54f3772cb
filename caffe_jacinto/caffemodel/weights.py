"""The numbers of a ``.caffemodel``, without Caffe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from caffe_jacinto.caffemodel.blobs import Blob, mapped, stored_layers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def read_weights(path: Path) -> dict[str, list[NDArray[np.float32]]]:
    """The blobs of each layer that has any, by the layer's name, in the file's order.

    Arrays are copies, in the shapes of the file; memory is that of the weights themselves. Both forms of a
    blob's shape are read, and the fork's raw and half-precision numbers.

    Raises:
        UserError: the file is missing, cut off or no weight file.
    """
    with mapped(path) as view:
        return {
            layer.name: [blob_values(view, blob) for blob in layer.blobs]
            for layer in stored_layers(view, path)
        }


def blob_values(view: memoryview, blob: Blob) -> NDArray[np.float32]:
    """The numbers of ``blob`` in the file's bytes ``view``."""
    import numpy as np

    stored = np.dtype(blob.number_format)
    parts = [
        np.frombuffer(view, stored, (end - start) // stored.itemsize, start).astype(np.float32)
        for start, end in blob.ranges
    ]
    flat = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.float32), *parts])
    return flat.reshape(blob.shape)
