"""BVLC AlexNet: five convolutions and three inner products, without batch norm.

The numbers are those of the published network (BVLC/caffe, models/bvlc_alexnet). It subtracts the training
set's mean image: `python -m caffe_jacinto.create_lmdb --mean`.
"""

from __future__ import annotations

from caffe_jacinto.networks.layers import (
    DATA_BLOB,
    LABEL_BLOB,
    Accuracy,
    Convolution,
    Dropout,
    Filler,
    InnerProduct,
    Layer,
    LocalResponseNorm,
    MaxPooling,
    Network,
    ReLU,
    SoftmaxWithLoss,
)

NARROW, NARROWER = Filler("gaussian", std=0.01), Filler("gaussian", std=0.005)
ZERO, TENTH = Filler("constant", value=0), Filler("constant", value=0.1)


def bvlc_alexnet(num_classes: int, crop_size: int) -> Network:
    """The network for square colour images of ``crop_size`` pixels."""
    layers: list[Layer] = [
        *_convolution(1, DATA_BLOB, 96, 11, stride=4, bias_filler=ZERO),
        *_norm_and_pool(1),
        *_convolution(2, "pool1", 256, 5, pad=2, group=2, bias_filler=TENTH),
        *_norm_and_pool(2),
        *_convolution(3, "pool2", 384, 3, pad=1, bias_filler=ZERO),
        *_convolution(4, "conv3", 384, 3, pad=1, group=2, bias_filler=TENTH),
        *_convolution(5, "conv4", 256, 3, pad=1, group=2, bias_filler=TENTH),
        MaxPooling("pool5", ("conv5",), "pool5", 3, 2),
        *_inner_product_with_dropout(6, "pool5"),
        *_inner_product_with_dropout(7, "fc6"),
        InnerProduct("fc8", ("fc7",), "fc8", num_classes, NARROW, ZERO),
    ]
    read = ("fc8", LABEL_BLOB)
    return Network(
        "bvlc_alexnet",
        3,
        crop_size,
        num_classes,
        tuple(layers),
        outputs=(Accuracy("accuracy", read, "accuracy", 1), SoftmaxWithLoss("loss", read, "loss")),
        title="AlexNet",
        mean_image=True,
        deploy_batch=10,
        deploy_fillers=False,
    )


def _convolution(
    number: int,
    bottom: str,
    outputs: int,
    kernel: int,
    *,
    stride: int = 1,
    pad: int = 0,
    group: int = 1,
    bias_filler: Filler,
) -> list[Layer]:
    name = f"conv{number}"
    return [
        Convolution(
            name,
            (bottom,),
            name,
            outputs,
            kernel,
            stride,
            pad,
            group,
            weight_filler=NARROW,
            bias_filler=bias_filler,
        ),
        ReLU(f"relu{number}", (name,), name),
    ]


def _norm_and_pool(number: int) -> list[Layer]:
    norm, pool = f"norm{number}", f"pool{number}"
    return [
        LocalResponseNorm(norm, (f"conv{number}",), norm, channels=5, alpha=1e-4, beta=0.75),
        MaxPooling(pool, (norm,), pool, 3, 2),
    ]


def _inner_product_with_dropout(number: int, bottom: str) -> list[Layer]:
    name = f"fc{number}"
    return [
        InnerProduct(name, (bottom,), name, 4096, NARROWER, TENTH),
        ReLU(f"relu{number}", (name,), name),
        Dropout(f"drop{number}", (name,), name, ratio=0.5),
    ]
