"""SqueezeNet 1.1: eight fire modules, a 1x1 convolution before a 1x1 and a 3x3 one side by side.

The numbers are those of the published network (forresti/SqueezeNet, SqueezeNet_v1.1; arXiv:1602.07360), which
was trained with crops of 227 pixels, not mirrored.
"""

from __future__ import annotations

from caffe_jacinto.networks.layers import (
    DATA_BLOB,
    LABEL_BLOB,
    Accuracy,
    Concat,
    Convolution,
    Dropout,
    Filler,
    GlobalAveragePooling,
    Layer,
    MaxPooling,
    Network,
    ReLU,
    SoftmaxWithLoss,
)

FIRES = ((2, 16), (3, 16), (4, 32), (5, 32), (6, 48), (7, 48), (8, 64), (9, 64))
"""Number and squeezed channels of each fire module; both its halves have four times as many outputs."""

POOLED = (3, 5)
"""The fire modules with a pooling after them."""


def squeezenet_v1_1(num_classes: int, crop_size: int) -> Network:
    """The network for square colour images of ``crop_size`` pixels."""
    layers: list[Layer] = [
        *_convolution("conv1", "relu_conv1", DATA_BLOB, 64, 3, stride=2),
        MaxPooling("pool1", ("conv1",), "pool1", 3, 2),
    ]
    last = "pool1"
    for number, squeezed in FIRES:
        layers += _fire(f"fire{number}", last, squeezed)
        last = f"fire{number}/concat"
        if number in POOLED:
            layers.append(MaxPooling(f"pool{number}", (last,), f"pool{number}", 3, 2))
            last = f"pool{number}"
    head = Filler("gaussian", std=0.01)
    layers += [
        Dropout("drop9", (last,), last, ratio=0.5),
        *_convolution("conv10", "relu_conv10", last, num_classes, 1, weight_filler=head),
        GlobalAveragePooling("pool10", ("conv10",), "pool10"),
    ]
    read = ("pool10", LABEL_BLOB)
    top5 = (
        (Accuracy("accuracy_top5", read, "accuracy_top5", 5, in_training=True),) if num_classes >= 5 else ()
    )
    return Network(
        "squeezenet_v1_1",
        3,
        crop_size,
        num_classes,
        tuple(layers),
        outputs=(
            SoftmaxWithLoss("loss", read, "loss"),
            Accuracy("accuracy", read, "accuracy", 1, in_training=True),
            *top5,
        ),
        title="",
        mean_values=(104, 117, 123),
        deploy_batch=10,
        deploy_fillers=False,
    )


def _fire(name: str, bottom: str, squeezed: int) -> list[Layer]:
    squeeze, small, large = (f"{name}/{part}" for part in ("squeeze1x1", "expand1x1", "expand3x3"))
    return [
        *_convolution(squeeze, f"{name}/relu_squeeze1x1", bottom, squeezed, 1),
        *_convolution(small, f"{name}/relu_expand1x1", squeeze, 4 * squeezed, 1),
        *_convolution(large, f"{name}/relu_expand3x3", squeeze, 4 * squeezed, 3, pad=1),
        Concat(f"{name}/concat", (small, large), f"{name}/concat"),
    ]


def _convolution(
    name: str,
    relu: str,
    bottom: str,
    outputs: int,
    kernel: int,
    *,
    stride: int = 1,
    pad: int = 0,
    weight_filler: Filler | None = None,
) -> list[Layer]:
    """A convolution and its ReLU; biases learn and decay as weights do."""
    return [
        Convolution(
            name,
            (bottom,),
            name,
            outputs,
            kernel,
            stride,
            pad,
            weight_filler=weight_filler or Filler("xavier"),
            bias_filler=None,  # Zeros, Caffe's default.
            bias_decay=1,
            bias_lr=1,
        ),
        ReLU(relu, (name,), name),
    ]
