"""Layers that compute one value from several: across bottoms, or along axes."""

from __future__ import annotations

from caffe_jacinto.netspec.layer_types.base import LayerType, same

TYPES: dict[str, LayerType] = {
    "Eltwise": LayerType(same),
}
