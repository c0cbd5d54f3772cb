"""A weight file without some of its layers, so that Caffe gives these new, random weights."""

from __future__ import annotations

from collections.abc import Collection
from io import BytesIO
from pathlib import Path

from caffe_jacinto.caffemodel.blobs import layer_in, mapped, stored_layers
from caffe_jacinto.caffemodel.wire import fields


def without_layers(weights: Path, names: Collection[str]) -> bytes:
    """The bytes of ``weights`` but for the layers ``names``; all others stay as they are, in their order.

    Raises:
        UserError: the file is missing, cut off or no weight file.
    """
    with mapped(weights) as view:
        stored_layers(view, weights)
        kept = BytesIO()
        position = 0
        for field in fields(view):
            layer = layer_in(view, field)
            if layer is None or layer.name not in names:
                kept.write(view[position : field.end])
            position = field.end
        return kept.getvalue()
