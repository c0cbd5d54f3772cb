"""ResNet10: one convolution, then four residual blocks of two 3x3 convolutions, and one inner product.

The numbers are those of the published network (cvjena/cnn-models, ResNet10_cvgj; arXiv:1612.01452). Its first
batch norm reads the image itself, so that no mean is subtracted before.
"""

from __future__ import annotations

from caffe_jacinto.networks.layers import (
    DATA_BLOB,
    LABEL_BLOB,
    Accuracy,
    BatchNorm,
    Convolution,
    Filler,
    GlobalAveragePooling,
    InnerProduct,
    Layer,
    MaxPooling,
    Network,
    ReLU,
    SoftmaxWithLoss,
    Sum,
)

BLOCK_OUTPUTS = (128, 256, 512)
"""Of the blocks that halve the image's sides, after the first one with 64."""


def resnet10(num_classes: int, crop_size: int) -> Network:
    """The network for square colour images of ``crop_size`` pixels."""
    fan_out = Filler("msra", fan_out=True)
    layers: list[Layer] = [
        BatchNorm("data_bn", (DATA_BLOB,), "data_bn", shift_lr=2),
        Convolution("conv1", ("data_bn",), "conv1", 64, 7, 2, 3, weight_filler=fan_out, bias_decay=1),
        *_norm_and_relu("conv1", "", "conv1", "conv1"),
        MaxPooling("conv1_pool", ("conv1",), "conv1_pool", 3, 2),
        *_two_convolutions("layer_64_1", "conv1_pool", 64, stride=1),
        Sum("layer_64_1_sum", ("layer_64_1_conv2", "conv1_pool"), "layer_64_1_sum"),
    ]
    last = "layer_64_1_sum"
    for outputs in BLOCK_OUTPUTS:
        layers += _halving_block(f"layer_{outputs}_1", last, outputs)
        last = f"layer_{outputs}_1_sum"
    layers += _norm_and_relu("last", "", last, last)
    layers.append(GlobalAveragePooling("global_pool", (last,), "global_pool"))
    layers.append(
        InnerProduct(
            "score",
            ("global_pool",),
            "score",
            num_classes,
            weight_filler=None,  # Zeros, Caffe's default.
            bias_filler=None,
            bias_decay=1,
        )
    )
    return Network("resnet10", 3, crop_size, num_classes, tuple(layers), _outputs(num_classes), title="")


def _outputs(num_classes: int) -> tuple[Layer, ...]:
    read = ("score", LABEL_BLOB)
    top5 = (Accuracy("accuracy/top5", read, "top5", 5),) if num_classes >= 5 else ()
    return (SoftmaxWithLoss("loss", read, "loss"), Accuracy("accuracy", read, "accuracy", 1), *top5)


def _halving_block(name: str, bottom: str, outputs: int) -> list[Layer]:
    """A residual block that halves height and width: batch norm and ReLU first, for both of its ways."""
    normed = f"{name}_bn1"
    expand = f"{name}_conv_expand"
    return [
        *_norm_and_relu(name, "1", bottom, normed),
        *_two_convolutions(name, normed, outputs, stride=2),
        Convolution(expand, (normed,), expand, outputs, 1, stride=2, bias=False),
        Sum(f"{name}_sum", (f"{name}_conv2", expand), f"{name}_sum"),
    ]


def _two_convolutions(name: str, bottom: str, outputs: int, *, stride: int) -> list[Layer]:
    first, second = f"{name}_conv1", f"{name}_conv2"
    return [
        Convolution(first, (bottom,), first, outputs, 3, stride, pad=1, bias=False),
        *_norm_and_relu(name, "2", first, first),
        Convolution(second, (first,), second, outputs, 3, pad=1, bias=False),
    ]


def _norm_and_relu(name: str, number: str, bottom: str, top: str) -> list[Layer]:
    return [
        BatchNorm(f"{name}_bn{number}", (bottom,), top, shift_lr=2),
        ReLU(f"{name}_relu{number}", (top,), top),
    ]
