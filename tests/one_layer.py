"""A layer of each kind, and one pass of a net: for the tests on a GPU, and for those that these are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from caffe_jacinto.engines.pytorch.net import TEST, TRAIN, Net
from caffe_jacinto.engines.pytorch.precision import autocast
from caffe_jacinto.engines.pytorch.snapshot import save_weights
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import parse_net

CLASSES = 10
IMAGES = (4, 8, 12, 12)
SHAPES: dict[str, tuple[int, ...]] = {
    **{"images": IMAGES, "part": (*IMAGES[:2], 7, 5), "factors": IMAGES[:2]},
    **{"rows": (4, CLASSES), "others": (4, CLASSES), "positive": (4, CLASSES)},
    **{"series": (6, 4, 7), "goes_on": (6, 4), "cells": (1, 4, 3), "sums": (1, 4, 12), "on": (1, 4)},
    **{"label": (4,), "numbers": (4,), "matrix": (CLASSES, CLASSES)},
}
"""Of what the layers read."""

TEACHER = f"""
layer {{ name: "data" type: "Input" top: "data" input_param {{ shape {{ dim: 1 dim: {CLASSES} }} }} }}
layer {{ name: "fc" type: "InnerProduct" bottom: "data" top: "fc" inner_product_param {{
  num_output: {CLASSES} weight_filler {{ type: "gaussian" std: 1 }} }} }}
layer {{ name: "prob" type: "Softmax" bottom: "fc" top: "prob" }}
"""

ONE_LAYER: dict[str, str] = {
    "Axpy": 'type: "Axpy" bottom: "factors" bottom: "images" bottom: "images"',
    "BN": """type: "BN" bottom: "images" bn_param { slope_filler { type: "gaussian" mean: 1 std: 0.2 }
        bias_filler { type: "gaussian" } momentum: 0.8 eps: 0.01 }""",
    "ConvolutionDepthwise": """type: "ConvolutionDepthwise" bottom: "images" convolution_param { num_output: 8
        kernel_size: 3 pad: 1 weight_filler { type: "msra" } }""",
    "DepthwiseConvolution": """type: "DepthwiseConvolution" bottom: "images" convolution_param { num_output: 8
        kernel_size: 3 stride: 2 group: 8 weight_filler { type: "msra" } }""",
    "Interp": 'type: "Interp" bottom: "images" interp_param { zoom_factor: 2 }',
    "Normalize": """type: "Normalize" bottom: "images" norm_param { across_spatial: false
        scale_filler { type: "gaussian" mean: 10 } channel_shared: false }""",
    "Permute": 'type: "Permute" bottom: "images" permute_param { order: 0 order: 2 order: 3 order: 1 }',
    "ReLU6": 'type: "ReLU6" bottom: "images"',
    "ShuffleChannel": 'type: "ShuffleChannel" bottom: "images" shuffle_channel_param { group: 4 }',
    "Upsample": 'type: "Upsample" bottom: "images" upsample_param { scale: 2 }',
    "AbsVal": 'type: "AbsVal" bottom: "images"',
    "Accuracy": 'type: "Accuracy" bottom: "rows" bottom: "label"',
    "BatchNorm": 'type: "BatchNorm" bottom: "images"',
    "ArgMax": 'type: "ArgMax" bottom: "rows" argmax_param { top_k: 3 }',
    "BNLL": 'type: "BNLL" bottom: "images"',
    "BatchReindex": 'type: "BatchReindex" bottom: "images" bottom: "numbers"',
    "Bias": 'type: "Bias" bottom: "images" bias_param { filler { type: "gaussian" } }',
    "Clip": 'type: "Clip" bottom: "images" clip_param { min: -1 max: 0.5 }',
    "Concat": 'type: "Concat" bottom: "images" bottom: "images"',
    "Convolution": """type: "Convolution" bottom: "images" convolution_param { num_output: 12 kernel_size: 3
        pad: 1 group: 4 weight_filler { type: "msra" } bias_filler { type: "gaussian" } }""",
    "ContrastiveLoss": 'type: "ContrastiveLoss" bottom: "rows" bottom: "others" bottom: "label"',
    "Crop": 'type: "Crop" bottom: "images" bottom: "part" crop_param { offset: 2 }',
    "Deconvolution": """type: "Deconvolution" bottom: "images" convolution_param { num_output: 12
        kernel_size: 4 stride: 2 pad: 1 group: 4 weight_filler { type: "msra" } }""",
    "DistillationLoss": """type: "DistillationLoss" bottom: "rows" bottom: "others" distillation_param {
        net: "teacher.prototxt" weights: "teacher.caffemodel" temperature: 2 }""",
    "Dropout": 'type: "Dropout" bottom: "images" dropout_param { dropout_ratio: 0 }',
    "DummyData": """type: "DummyData" dummy_data_param { shape { dim: 4 dim: 3 }
        data_filler { type: "constant" value: 2 } }""",
    "ELU": 'type: "ELU" bottom: "images"',
    "Eltwise": 'type: "Eltwise" bottom: "images" bottom: "images" eltwise_param { operation: MAX }',
    "Embed": """type: "Embed" bottom: "numbers" embed_param { num_output: 6 input_dim: 5
        weight_filler { type: "gaussian" } bias_filler { type: "gaussian" } }""",
    "EuclideanLoss": 'type: "EuclideanLoss" bottom: "rows" bottom: "others"',
    "Exp": 'type: "Exp" bottom: "images" exp_param { base: 2 scale: 0.5 }',
    "Filter": 'type: "Filter" bottom: "images" bottom: "numbers"',
    "Flatten": 'type: "Flatten" bottom: "images"',
    "HingeLoss": 'type: "HingeLoss" bottom: "rows" bottom: "label"',
    "Im2col": 'type: "Im2col" bottom: "images" convolution_param { kernel_size: 3 stride: 2 pad: 1 }',
    "InfogainLoss": 'type: "InfogainLoss" bottom: "rows" bottom: "label" bottom: "matrix"',
    "InnerProduct": """type: "InnerProduct" bottom: "images" inner_product_param { num_output: 7
        weight_filler { type: "xavier" } bias_filler { type: "gaussian" } }""",
    "LRN": 'type: "LRN" bottom: "images" lrn_param { local_size: 5 alpha: 0.1 beta: 0.75 }',
    "Log": 'type: "Log" bottom: "images" log_param { base: 2 scale: 0.1 shift: 3 }',
    "LSTM": """type: "LSTM" bottom: "series" bottom: "goes_on" recurrent_param { num_output: 5
        weight_filler { type: "gaussian" } bias_filler { type: "gaussian" } }""",
    "LSTMUnit": 'type: "LSTMUnit" bottom: "cells" bottom: "sums" bottom: "on" top: "c"',
    "MVN": 'type: "MVN" bottom: "images"',
    "MultinomialLogisticLoss": 'type: "MultinomialLogisticLoss" bottom: "positive" bottom: "label"',
    "Parameter": 'type: "Parameter" parameter_param { shape { dim: 3 dim: 2 } }',
    "Pooling": 'type: "Pooling" bottom: "images" pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 1 }',
    "Power": 'type: "Power" bottom: "images" power_param { scale: 2 shift: -1 }',
    "PReLU": 'type: "PReLU" bottom: "images"',
    "ReLU": 'type: "ReLU" bottom: "images" relu_param { negative_slope: 0.1 }',
    "Reduction": 'type: "Reduction" bottom: "images" reduction_param { operation: SUMSQ axis: 1 }',
    "Reshape": 'type: "Reshape" bottom: "images" reshape_param { shape { dim: 0 dim: -1 } }',
    "RNN": """type: "RNN" bottom: "series" bottom: "goes_on" recurrent_param { num_output: 5
        weight_filler { type: "gaussian" } bias_filler { type: "gaussian" } }""",
    "SPP": 'type: "SPP" bottom: "images" spp_param { pyramid_height: 3 pool: AVE }',
    "Scale": """type: "Scale" bottom: "images" scale_param { bias_term: true filler { type: "gaussian" }
        bias_filler { type: "gaussian" } }""",
    "Sigmoid": 'type: "Sigmoid" bottom: "images"',
    "SigmoidCrossEntropyLoss": 'type: "SigmoidCrossEntropyLoss" bottom: "rows" bottom: "others"',
    "Silence": 'type: "Silence" bottom: "images"',
    "Slice": 'type: "Slice" bottom: "images" top: "other" slice_param { slice_point: 3 }',
    "Split": 'type: "Split" bottom: "images" top: "other"',
    "Softmax": 'type: "Softmax" bottom: "rows"',
    "SoftmaxWithLoss": 'type: "SoftmaxWithLoss" bottom: "rows" bottom: "label"',
    "Swish": 'type: "Swish" bottom: "images"',
    "TanH": 'type: "TanH" bottom: "images"',
    "Threshold": 'type: "Threshold" bottom: "images"',
    "Tile": 'type: "Tile" bottom: "images" tile_param { tiles: 2 }',
}
"""Each kind of layer, as it is tested: all but its name and, for most, its top."""


CHAIN = """layer { name: "conv" type: "Convolution" bottom: "images" top: "conv" convolution_param {
    num_output: 32 kernel_size: 5 stride: 2 pad: 2 weight_filler { type: "msra" }
    bias_filler { type: "gaussian" } } }
layer { name: "norm" type: "BatchNorm" bottom: "conv" top: "conv" NORM }
SCALE
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool"
    pooling_param { pool: MAX kernel_size: 2 stride: 2 } }
"""
SCALE = """layer { name: "scale" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true
    filler { type: "gaussian" mean: 1 std: 0.2 } bias_filler { type: "gaussian" } } }"""


def inputs_text(**shapes: tuple[int, ...]) -> str:
    return "".join(
        f'layer {{ name: "{name}" type: "Input" top: "{name}" input_param {{ shape {{'
        f"{''.join(f' dim: {dim}' for dim in shape)} }} }} }}\n"
        for name, shape in shapes.items()
    )


def write_teacher(folder: Path) -> None:
    """The network that DistillationLoss reads."""
    (folder / "teacher.prototxt").write_text(TEACHER)
    net = Net(parse_net(TEACHER, Dialect.BVLC, "net"), TEST, Dialect.BVLC, where="net", seed=8)
    save_weights(net, folder / "teacher.caffemodel")


def text_of(kind: str) -> str:
    """A net of that layer alone, which passes gradients to its inputs."""
    read = {name: shape for name, shape in SHAPES.items() if f'bottom: "{name}"' in ONE_LAYER[kind]}
    top = "" if kind == "Silence" else 'top: "top"'
    return f'force_backward: true\n{inputs_text(**read)}layer {{ name: "tested" {ONE_LAYER[kind]} {top} }}\n'


def chain(dialect: Dialect) -> str:
    """The layers of a convolution, which run as one; from the input ``images``."""
    if dialect is Dialect.BVLC:
        return CHAIN.replace("NORM", "batch_norm_param { moving_average_fraction: 0.9 }").replace(
            "SCALE", SCALE
        )
    norm = """batch_norm_param { moving_average_fraction: 0.9 scale_bias: true
        scale_filler { type: "gaussian" mean: 1 std: 0.2 } bias_filler { type: "gaussian" } }"""
    return CHAIN.replace("NORM", norm).replace("SCALE", "")


def net_on(device: torch.device, text: str, dialect: Dialect = Dialect.BVLC) -> Net:
    return Net(parse_net(text, dialect, "net"), TRAIN, dialect, where="net", seed=3, device=device)


def one_pass(net: Net, values: dict[str, Any], precision: str = "fp32") -> dict[str, Any]:
    """Outputs, gradients of inputs and blobs, and the blobs themselves, by name."""
    given = {}
    for name, value in values.items():
        tensor = torch.from_numpy(value).to(net.device)
        if tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        given[name] = tensor.requires_grad_(name not in ("label", "numbers", "goes_on", "on"))
    weights = np.random.default_rng(7)
    with autocast(net.device, precision):
        values_of = {}
        loss = torch.zeros((), device=net.device)
        state = dict(given)
        for step in net.steps:
            state.update(zip(step.tops, step(*(state[name] for name in step.bottoms)), strict=True))
        for name in net.output_names:
            top = state[name].float()
            values_of[name] = top.detach()
            drawn = torch.from_numpy(weights.standard_normal(tuple(top.shape)).astype(np.float32))
            if top.requires_grad:
                loss = loss + (top * drawn.to(net.device)).sum()
    if loss.requires_grad:
        loss.backward()
    found = {f"output {name}": value for name, value in values_of.items()}
    for name, tensor in given.items():
        if tensor.grad is not None:
            found[f"gradient of {name}"] = tensor.grad
    for layer, index, blob in net.blobs:
        found[f"{layer}[{index}]"] = blob.tensor.detach()
        if blob.tensor.grad is not None:
            found[f"gradient of {layer}[{index}]"] = blob.tensor.grad
    return {name: value.cpu() for name, value in found.items()}


def drawn(net: Net, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    values = {name: random.standard_normal(net.shapes[name]).astype(np.float32) for name in net.inputs}
    if "positive" in values:
        values["positive"] = np.abs(values["positive"])
    for name, count in (("label", CLASSES), ("numbers", 4), ("goes_on", 2), ("on", 2)):
        if name in values:
            values[name] = random.integers(0, count, net.shapes[name]).astype(np.float32)
    return values
