"""JacintoNet11: ten convolutions in five pairs, max pooling between them, and one inner product.

The numbers are those of the published network (caffe-jacinto-models, branch caffe-0.17,
imagenet_jacintonet11v2).
"""

from __future__ import annotations

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.networks.layers import (
    DATA_BLOB,
    GlobalAveragePooling,
    InnerProduct,
    Layer,
    MaxPooling,
    Network,
    Shift,
    conv_bn_relu,
    loss_and_accuracies,
)

STRIDES = (2, 2, 2, 2, 2)
"""Of conv1a and of pool1 to pool4, as published for ImageNet."""

PAIR_OUTPUTS = (64, 128, 256, 512)
"""Outputs of res2a to res5a."""


def jacintonet11(num_classes: int, crop_size: int, strides: tuple[int, ...] = STRIDES) -> Network:
    """The network for square colour images of ``crop_size`` pixels.

    ``strides`` are those of conv1a and of pool1 to pool4; a pooling's kernel is its stride, and the pooling
    stays when that is 1.

    Raises:
        UserError: not five strides, or together they shrink the image to less than a pixel.
    """
    check_strides(strides, crop_size)
    first, *pools = strides
    layers: list[Layer] = [Shift("data/bias", (DATA_BLOB,), "data/bias", -128)]
    layers += conv_bn_relu("data/bias", "conv1a", 32, 5, stride=first, pad=2)
    layers += conv_bn_relu("conv1a", "conv1b", 32, 3, pad=1, group=4)
    last = "conv1b"
    for number, (outputs, stride) in enumerate(zip(PAIR_OUTPUTS, pools, strict=True), start=1):
        pool, pair = f"pool{number}", f"res{number + 1}a_branch2"
        layers.append(MaxPooling(pool, (last,), pool, stride, stride))
        layers += conv_bn_relu(pool, f"{pair}a", outputs, 3, pad=1)
        layers += conv_bn_relu(f"{pair}a", f"{pair}b", outputs, 3, pad=1, group=4)
        last = f"{pair}b"
    layers.append(GlobalAveragePooling("pool5", (last,), "pool5"))
    head = f"fc{num_classes}"
    layers.append(InnerProduct(head, ("pool5",), head, num_classes))
    return Network(
        "jacintonet11",
        3,
        crop_size,
        num_classes,
        tuple(layers),
        loss_and_accuracies(head, num_classes),
        title="jacintonet11v2",
        title_says_stage=True,
        mean_values=(0, 0, 0),
    )


def check_strides(strides: tuple[int, ...], crop_size: int) -> None:
    """Raises UserError unless there are five strides of 1 or more that leave at least one pixel."""
    text = ",".join(map(str, strides))
    if len(strides) != len(STRIDES) or min(strides) < 1:
        raise UserError(
            f"strides {text}: jacintonet11 takes five whole numbers of 1 or more "
            "(conv1a, pool1, pool2, pool3, pool4), like 2,2,2,2,2"
        )
    shrinks = 1
    for stride in strides:
        shrinks *= stride
    if shrinks > crop_size:
        raise UserError(
            f"strides {text} shrink the image {shrinks} times in height and width, "
            f"more than its {crop_size} pixels; use smaller strides or a crop of at least {shrinks}"
        )
