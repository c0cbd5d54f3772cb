"""MobileNet v1: a convolution, thirteen pairs of a depthwise 3x3 and a 1x1 convolution, and a 1x1 classifier.

The numbers are those of the published network (shicai/MobileNet-Caffe, mobilenet_deploy.prototxt;
arXiv:1704.04861). Only its deploy network was published; the loss and the accuracies are ours.
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
    loss_and_accuracies,
)

PAIRS = (
    ("2_1", 64, 1),
    ("2_2", 128, 2),
    ("3_1", 128, 1),
    ("3_2", 256, 2),
    ("4_1", 256, 1),
    ("4_2", 512, 2),
    *((f"5_{number}", 512, 1) for number in range(1, 6)),
    ("5_6", 1024, 2),
    ("6", 1024, 1),
)
"""Name, outputs and stride of each pair."""

MEAN, SCALE = (103.94, 116.78, 123.68), 0.017
"""Of the images, as a comment in the published file says."""


def mobilenet_v1(num_classes: int, crop_size: int, width: float = 1.0) -> Network:
    """The network for square colour images of ``crop_size`` pixels.

    ``width`` multiplies the channels of every layer (the paper's alpha: 0.25, 0.5, 0.75 or 1), which are then
    rounded to a multiple of 8.
    """
    inputs = _channels(32, width)
    layers: list[Layer] = [*_convolution("conv1", "relu1", DATA_BLOB, inputs, 3, stride=2)]
    last = "conv1"
    for name, outputs, stride in PAIRS:
        depthwise, separable = f"conv{name}/dw", f"conv{name}/sep"
        layers += _convolution(depthwise, f"relu{name}/dw", last, inputs, 3, stride=stride, group=inputs)
        inputs = _channels(outputs, width)
        layers += _convolution(separable, f"relu{name}/sep", depthwise, inputs, 1)
        last = separable
    layers.append(GlobalAveragePooling("pool6", (last,), "pool6"))
    layers.append(Convolution("fc7", ("pool6",), "fc7", num_classes, 1))
    return Network(
        "mobilenet_v1",
        3,
        crop_size,
        num_classes,
        tuple(layers),
        loss_and_accuracies("fc7", num_classes),
        title="MOBILENET",
        mean_values=MEAN,
        scale=SCALE,
    )


def _channels(number: int, width: float) -> int:
    return max(8, round(number * width / 8) * 8)


def _convolution(
    name: str, relu: str, bottom: str, outputs: int, kernel: int, *, stride: int = 1, group: int = 1
) -> list[Layer]:
    """A convolution with its batch norm and ReLU in place."""
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
        BatchNorm(f"{name}/bn", (name,), name, decay=0),
        ReLU(relu, (name,), name),
    ]
