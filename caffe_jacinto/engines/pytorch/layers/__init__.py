"""Caffe's layers on PyTorch: one table, from a layer's type to the function that builds it.

A builder reads the layer's message, makes its blobs and returns the function that computes its tops from the
blobs and the bottoms. Each file here holds a family of layers and ends with its part of the table; the
families are the same as in netspec/layer_types, where the shapes of blobs and tops come from. Definitions:
Caffe's schema (caffe.proto) and its layers; the tests compare each with pycaffe.
"""

from __future__ import annotations

from caffe_jacinto.engines.pytorch.layer_setup import Builder
from caffe_jacinto.engines.pytorch.layers import (
    activations,
    arithmetic,
    convolution,
    distillation,
    forks,
    linear,
    losses,
    normalization,
    pooling,
    recurrent,
    shapes,
    sources,
)

LAYERS: dict[str, Builder] = {
    **activations.LAYERS,
    **arithmetic.LAYERS,
    **convolution.LAYERS,
    **distillation.LAYERS,
    **forks.LAYERS,
    **linear.LAYERS,
    **losses.LAYERS,
    **normalization.LAYERS,
    **pooling.LAYERS,
    **recurrent.LAYERS,
    **shapes.LAYERS,
    **sources.LAYERS,
}
"""By LayerParameter.type. Data and Input layers have no function: their tops are given to the net."""

REFUSED = {
    "HDF5Output": "it writes blobs to a file in each pass; remove it, and write them with pycaffe",
    "MemoryData": "a program has to put the images into its memory; use Data, ImageData or HDF5Data",
    "Python": "its computation is Python code inside of Caffe's process; use stock Caffe",
    "WindowData": "it crops windows out of images by a list; write the crops to an LMDB, and use Data",
}
"""The layers of stock Caffe that are not supported, and why."""
