"""ResNet-18 and ResNet-50: a convolution, eight or sixteen residual blocks, and one inner product.

The numbers are those of the published networks: of ResNet-50 the authors' (KaimingHe/deep-residual-networks,
ResNet-50-deploy.prototxt; arXiv:1512.03385), whose deploy network alone was published, of ResNet-18 those of
HolmesShuan/ResNet-18-Caffemodel-on-ImageNet. A block's stride is that of its first convolution. The training
of ResNet-50, its loss, fillers and the fraction of the running statistics, follows ResNet-18's.
"""

from __future__ import annotations

from caffe_jacinto.networks.layers import (
    DATA_BLOB,
    LABEL_BLOB,
    Accuracy,
    AveragePooling,
    BatchNorm,
    Convolution,
    Filler,
    InnerProduct,
    Layer,
    MaxPooling,
    Network,
    ReLU,
    SoftmaxWithLoss,
    Sum,
)

CHANNELS = (64, 128, 256, 512)
"""Of the blocks of each size; the first block of each size but the first halves the image's sides."""


def resnet18(num_classes: int, crop_size: int) -> Network:
    """The network with two 3x3 convolutions a block, for square colour images of ``crop_size`` pixels."""
    return _resnet("resnet18", "ResNet-18", num_classes, crop_size, (2, 2, 2, 2), bottleneck=False)


def resnet50(num_classes: int, crop_size: int) -> Network:
    """The network with a 3x3 between two 1x1 convolutions a block, for square colour images.

    Its head is named after the number of classes, as the published ``fc1000``.
    """
    return _resnet("resnet50", "ResNet-50", num_classes, crop_size, (3, 4, 6, 3), bottleneck=True)


def _resnet(
    name: str,
    title: str,
    num_classes: int,
    crop_size: int,
    blocks: tuple[int, ...],
    *,
    bottleneck: bool,
) -> Network:
    """``blocks``: how many there are of each size."""
    layers: list[Layer] = [
        *_convolution("conv1", "conv1", DATA_BLOB, 64, 7, stride=2, bias=bottleneck),
        ReLU("conv1_relu", ("conv1",), "conv1"),
        MaxPooling("pool1", ("conv1",), "pool1", 3, 2),
    ]
    last = "pool1"
    for size, (channels, number) in enumerate(zip(CHANNELS, blocks, strict=True), start=2):
        for index in range(number):
            block = f"{size}{'abcdef'[index]}"
            stride = 2 if index == 0 and size > 2 else 1
            layers += _block(block, last, channels, stride, first=index == 0, bottleneck=bottleneck)
            last = f"res{block}"
    head = f"fc{num_classes}"
    layers += [
        AveragePooling("pool5", (last,), "pool5", 7, 1),
        InnerProduct(
            head,
            ("pool5",),
            head,
            num_classes,
            weight_filler=Filler("xavier"),
            bias_lr=1 if bottleneck else 2,
            bias_decay=1,
        ),
    ]
    return Network(
        name,
        3,
        crop_size,
        num_classes,
        tuple(layers),
        _outputs(head, num_classes),
        title=title,
        mean_values=(104, 117, 123),
        deploy_fillers=not bottleneck,
    )


def _outputs(head: str, num_classes: int) -> tuple[Layer, ...]:
    read = (head, LABEL_BLOB)
    accuracies = [Accuracy(f"acc/top-{k}", read, f"acc/top-{k}", k) for k in (1, 5) if k <= num_classes]
    return (SoftmaxWithLoss("loss", read, "loss"), *accuracies)


def _block(
    block: str, bottom: str, channels: int, stride: int, *, first: bool, bottleneck: bool
) -> list[Layer]:
    """A residual block; the ``first`` of a size has a 1x1 convolution on its other way, too."""
    outputs = 4 * channels if bottleneck else channels
    kernels = ((channels, 1), (channels, 3), (outputs, 1)) if bottleneck else ((channels, 3), (channels, 3))
    layers: list[Layer] = []
    shortcut = bottom
    if first:
        shortcut = f"res{block}_branch1"
        layers += _convolution(shortcut, f"{block}_branch1", bottom, outputs, 1, stride=stride)
    last = bottom
    for index, (width, kernel) in enumerate(kernels):
        branch = f"{block}_branch2{'abc'[index]}"
        name = f"res{branch}"
        layers += _convolution(name, branch, last, width, kernel, stride=stride if index == 0 else 1)
        if index < len(kernels) - 1:
            layers.append(ReLU(f"{name}_relu", (name,), name))
        last = name
    total = f"res{block}"
    return [*layers, Sum(total, (shortcut, last), total), ReLU(f"{total}_relu", (total,), total)]


def _convolution(
    name: str, suffix: str, bottom: str, outputs: int, kernel: int, *, stride: int = 1, bias: bool = False
) -> list[Layer]:
    """A convolution and its batch norm in place."""
    norm = f"bn_{suffix}" if suffix == name else f"bn{suffix}"
    return [
        Convolution(
            name,
            (bottom,),
            name,
            outputs,
            kernel,
            stride,
            pad=kernel // 2,
            bias=bias,
            bias_filler=None,
            bias_lr=1,
            bias_decay=1,
        ),
        BatchNorm(norm, (name,), name, moving_average_fraction=0.9),
    ]
