"""MobileNet v2: inverted residual blocks, whose depthwise 3x3 convolution lies between two 1x1 ones.

The numbers are those of the published network (shicai/MobileNet-Caffe, mobilenet_v2_deploy.prototxt;
arXiv:1801.04381). It has ReLU where the paper has ReLU6, and halves the image before the blocks of 96
channels, where the paper does so before those of 64. Only its deploy network was published; the loss and the
accuracies are ours.
"""

from __future__ import annotations

from caffe_jacinto.networks.layers import (
    DATA_BLOB,
    BatchNorm,
    Convolution,
    GlobalAveragePooling,
    Layer,
    Network,
    ReLU,
    Sum,
    loss_and_accuracies,
)
from caffe_jacinto.networks.mobilenet_v1 import MEAN, SCALE

BLOCKS = (
    ("2_1", 32, 16, 1),
    ("2_2", 96, 24, 2),
    ("3_1", 144, 24, 1),
    ("3_2", 144, 32, 2),
    ("4_1", 192, 32, 1),
    ("4_2", 192, 32, 1),
    ("4_3", 192, 64, 1),
    ("4_4", 384, 64, 1),
    ("4_5", 384, 64, 1),
    ("4_6", 384, 64, 1),
    ("4_7", 384, 96, 2),
    ("5_1", 576, 96, 1),
    ("5_2", 576, 96, 1),
    ("5_3", 576, 160, 2),
    ("6_1", 960, 160, 1),
    ("6_2", 960, 160, 1),
    ("6_3", 960, 320, 1),
)
"""Name, channels inside, outputs and stride of each block. Where the outputs are as many as the inputs, and
the stride is 1, the block's input is added to its output."""


def mobilenet_v2(num_classes: int, crop_size: int) -> Network:
    """The network for square colour images of ``crop_size`` pixels."""
    layers: list[Layer] = [*_convolution("conv1", DATA_BLOB, 32, 3, stride=2), _relu("relu1", "conv1")]
    last, inputs = "conv1/bn", 32
    for name, inside, outputs, stride in BLOCKS:
        expand, depthwise, linear = (f"conv{name}/{part}" for part in ("expand", "dwise", "linear"))
        layers += [
            *_convolution(expand, last, inside, 1),
            _relu(f"relu{name}/expand", expand),
            *_convolution(depthwise, f"{expand}/bn", inside, 3, stride=stride, group=inside),
            _relu(f"relu{name}/dwise", depthwise),
            *_convolution(linear, f"{depthwise}/bn", outputs, 1),
        ]
        if outputs == inputs and stride == 1:
            layers.append(Sum(f"block_{name}", (last, f"{linear}/bn"), f"block_{name}"))
            last = f"block_{name}"
        else:
            last = f"{linear}/bn"
        inputs = outputs
    layers += [
        *_convolution("conv6_4", last, 1280, 1),
        _relu("relu6_4", "conv6_4"),
        GlobalAveragePooling("pool6", ("conv6_4/bn",), "pool6"),
        Convolution("fc7", ("pool6",), "fc7", num_classes, 1),
    ]
    return Network(
        "mobilenet_v2",
        3,
        crop_size,
        num_classes,
        tuple(layers),
        loss_and_accuracies("fc7", num_classes),
        title="MOBILENET_V2",
        mean_values=MEAN,
        scale=SCALE,
    )


def _convolution(
    name: str, bottom: str, outputs: int, kernel: int, *, stride: int = 1, group: int = 1
) -> list[Layer]:
    """A convolution and its batch norm, which writes a blob of its own, ``<name>/bn``."""
    return [
        Convolution(
            name,
            (bottom,),
            name,
            outputs,
            kernel,
            stride,
            pad=kernel // 2,
            group=group,
            bias=False,
            bias_filler=None,
            caffe_engine=group > 1,
        ),
        BatchNorm(f"{name}/bn", (name,), f"{name}/bn", decay=0),
    ]


def _relu(name: str, convolution: str) -> Layer:
    """In place, after the batch norm of a convolution."""
    return ReLU(name, (f"{convolution}/bn",), f"{convolution}/bn")
