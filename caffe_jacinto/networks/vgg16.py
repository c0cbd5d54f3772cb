"""VGG-16: thirteen 3x3 convolutions in five groups, and three inner products; no batch norm.

The numbers are those of configuration D of arXiv:1409.1556, the layers' names those of its published Caffe
model, VGG_ILSVRC_16_layers. No training network was published for Caffe; the fillers are He's, with which a
network of this depth trains from random weights.
"""

from __future__ import annotations

from caffe_jacinto.networks.layers import (
    DATA_BLOB,
    Convolution,
    Dropout,
    InnerProduct,
    Layer,
    MaxPooling,
    Network,
    ReLU,
    loss_and_accuracies,
)

GROUPS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Outputs and number of the convolutions of each group, after which a pooling halves the image's sides."""


def vgg16(num_classes: int, crop_size: int) -> Network:
    """The network for square colour images of ``crop_size`` pixels."""
    layers: list[Layer] = []
    last = DATA_BLOB
    for group, (outputs, convolutions) in enumerate(GROUPS, start=1):
        for number in range(1, convolutions + 1):
            name = f"conv{group}_{number}"
            layers += [
                Convolution(name, (last,), name, outputs, 3, pad=1, bias_lr=1, bias_decay=1),
                ReLU(f"relu{group}_{number}", (name,), name),
            ]
            last = name
        layers.append(MaxPooling(f"pool{group}", (last,), f"pool{group}", 2, 2))
        last = f"pool{group}"
    for number in (6, 7):
        name = f"fc{number}"
        layers += [
            InnerProduct(name, (last,), name, 4096, bias_lr=1, bias_decay=1),
            ReLU(f"relu{number}", (name,), name),
            Dropout(f"drop{number}", (name,), name, ratio=0.5),
        ]
        last = name
    layers.append(InnerProduct("fc8", (last,), "fc8", num_classes, bias_lr=1, bias_decay=1))
    return Network(
        "vgg16",
        3,
        crop_size,
        num_classes,
        tuple(layers),
        loss_and_accuracies("fc8", num_classes),
        title="VGG_ILSVRC_16_layers",
        mean_values=(103.939, 116.779, 123.68),
        deploy_fillers=False,
    )
