"""A deploy network and its weights as an ONNX model, made with onnx's own helpers.

The model takes batches of any size. Height and width are those of the deploy network: Caffe's pooling rounds
its sizes up, and in ONNX that takes explicit padding. Weights keep their layout and their zeros. The files
here hold the same families of layers as netspec/layer_types.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.export.onnx import (
    activations,
    arithmetic,
    convolution,
    forks,
    linear,
    normalization,
    pooling,
    shapes,
)
from caffe_jacinto.export.onnx.graph import NEWEST_OPSET, OPSET, Graph, Operator
from caffe_jacinto.export.onnx.rounding import Rounding
from caffe_jacinto.export.stock_net import stock_net
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.quantization.record import Recorded

REQUIREMENT = "onnx>=1.15"
"""The package to install; the extra `onnx` in pyproject.toml."""

OPERATORS: dict[str, Operator] = {
    **activations.OPERATORS,
    **arithmetic.OPERATORS,
    **convolution.OPERATORS,
    **forks.OPERATORS,
    **linear.OPERATORS,
    **normalization.OPERATORS,
    **pooling.OPERATORS,
    **shapes.OPERATORS,
}
"""By LayerParameter.type."""


def export_onnx(
    deploy_text: str,
    where: str,
    dialect: Dialect | None,
    weights: Path,
    metadata: Mapping[str, str] | None = None,
    *,
    opset: int | None = None,
    batch: int | None = None,
    quantized: Recorded | None = None,
) -> bytes:
    """The bytes of a ``.onnx`` file: the deploy network ``deploy_text`` with the weights of a file.

    Inputs and outputs have the names of Caffe's blobs. ``where`` names the text in messages. Where
    ``dialect`` is None, the text may be in either. ``metadata`` becomes the model's ``metadata_props``.

    Args:
        opset: the version of ONNX's operators, from `OPSET`, which is the default, to `NEWEST_OPSET`.
        batch: the number of images that the model takes at a time; None: any.
        quantized: write numbers for weights, and round activations (QDQ form).

    Raises:
        UserError: as `stock_net`; a layer or field cannot be exported (it is named); onnx is missing.
    """
    try:
        import onnx
    except ImportError:
        raise UserError(
            f"writing ONNX needs the Python package onnx: {sys.executable} -m pip install '{REQUIREMENT}'"
        ) from None
    net = stock_net(deploy_text, where, dialect, weights)
    opset = OPSET if opset is None else opset
    if not OPSET <= opset <= NEWEST_OPSET:
        raise UserError(f"opset {opset}: give {OPSET} to {NEWEST_OPSET}")
    rounding = Rounding(quantized, opset, where) if quantized is not None else None
    if rounding is not None:
        inputs = [top for layer in net.layers if layer.type == "Input" for top in layer.message.top]
        rounding.check_names([layer.name for layer in net.layers], inputs)
    model = Graph(net, where, OPERATORS, opset=opset, batch=batch, rounding=rounding).model()
    onnx.helper.set_model_props(model, dict(metadata or {}))
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{where}: the ONNX model would not be valid: {reason}; correct the network"
        ) from error
    return bytes(model.SerializeToString())


__all__ = ["NEWEST_OPSET", "OPERATORS", "OPSET", "REQUIREMENT", "export_onnx"]
