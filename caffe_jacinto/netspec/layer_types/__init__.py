"""The types of layers: the shapes that each gives, the blobs that it has, and how it is drawn. One table.

Rules follow Caffe 1.0's Reshape and LayerSetUp methods (src/caffe/layers). A dimension that the network does
not determine is None; so is a shape of which nothing is known. A new type of layer is one entry in the table
of its family, one of the files here.
"""

from __future__ import annotations

from caffe_jacinto.netspec.layer_types import (
    activations,
    arithmetic,
    convolution,
    forks,
    linear,
    losses,
    normalization,
    pooling,
    recurrent,
    shapes,
    sources,
)
from caffe_jacinto.netspec.layer_types.base import Dim, LayerType, Role, Shape, Shapes, is_known
from caffe_jacinto.netspec.layer_types.geometry import (
    Geometry,
    GeometryFault,
    geometry,
    geometry_fault,
    spatial_axes,
)
from caffe_jacinto.netspec.layer_types.sources import DATA_PARAMETERS
from caffe_jacinto.prototxt.tree import Message

LAYER_TYPES: dict[str, LayerType] = {
    **activations.TYPES,
    **arithmetic.TYPES,
    **convolution.TYPES,
    **forks.TYPES,
    **linear.TYPES,
    **losses.TYPES,
    **normalization.TYPES,
    **pooling.TYPES,
    **recurrent.TYPES,
    **shapes.TYPES,
    **sources.TYPES,
}
"""By LayerParameter.type."""


def output_shapes(layer: Message, bottoms: Shapes, tops: int) -> list[Shape | None]:
    """The shapes of a layer's ``tops`` outputs; a dimension below 1 is an output of which nothing is left."""
    kind = LAYER_TYPES.get(layer.string("type"))
    found: list[Shape | None] = []
    if kind is not None:
        try:
            found = list(kind.tops(layer, bottoms, tops))
        except (IndexError, ValueError, TypeError, ZeroDivisionError):  # the layer does not fit its input
            found = []
    return (found + [None] * tops)[:tops]


def blob_shapes_of(layer: Message, bottoms: Shapes) -> list[Shape]:
    """The shapes of a layer's blobs, as far as the network determines them; none where Caffe stops at it."""
    kind = LAYER_TYPES.get(layer.string("type"))
    if kind is None or not (bottoms or kind.bottomless):
        return []
    try:
        return kind.blobs(layer, bottoms)
    except (IndexError, ValueError, TypeError, ZeroDivisionError):
        return []


def blob_name(layer_type: str, index: int) -> str:
    """What blob number ``index`` of a layer of this type holds."""
    names = LAYER_TYPES[layer_type].blob_names if layer_type in LAYER_TYPES else ()
    return names[index] if index < len(names) else f"blob {index}"


def role_of(layer_type: str) -> Role:
    """How a layer of this type is drawn."""
    return LAYER_TYPES[layer_type].role if layer_type in LAYER_TYPES else "other"


__all__ = [
    "DATA_PARAMETERS",
    "LAYER_TYPES",
    "Dim",
    "Geometry",
    "GeometryFault",
    "LayerType",
    "Role",
    "Shape",
    "Shapes",
    "blob_name",
    "blob_shapes_of",
    "geometry",
    "geometry_fault",
    "is_known",
    "output_shapes",
    "role_of",
    "spatial_axes",
]
