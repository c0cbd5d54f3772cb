"""GoogLeNet: nine inception modules, and two auxiliary classifiers with losses of their own in training.

The numbers are those of the published network (BVLC/caffe, models/bvlc_googlenet; arXiv:1409.4842).
"""

from __future__ import annotations

from caffe_jacinto.networks.layers import (
    DATA_BLOB,
    LABEL_BLOB,
    Accuracy,
    AveragePooling,
    Concat,
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

XAVIER, FIFTH = Filler("xavier"), Filler("constant", value=0.2)

MODULES = (
    ("3a", 64, 96, 128, 16, 32, 32),
    ("3b", 128, 128, 192, 32, 96, 64),
    ("4a", 192, 96, 208, 16, 48, 64),
    ("4b", 160, 112, 224, 24, 64, 64),
    ("4c", 128, 128, 256, 24, 64, 64),
    ("4d", 112, 144, 288, 32, 64, 64),
    ("4e", 256, 160, 320, 32, 128, 128),
    ("5a", 256, 160, 320, 32, 128, 128),
    ("5b", 384, 192, 384, 48, 128, 128),
)
"""Name, and outputs of 1x1, of 3x3 (reduced, then in full), of 5x5 (likewise) and of the pooling's 1x1."""

POOLED = {"3b": "pool3", "4e": "pool4"}
"""The modules with a pooling after them."""

CLASSIFIED = {"4a": "loss1", "4d": "loss2"}
"""The modules that an auxiliary classifier reads."""


def googlenet(num_classes: int, crop_size: int) -> Network:
    """The network for square colour images of ``crop_size`` pixels."""
    layers: list[Layer] = [
        *_convolution("conv1/7x7_s2", "conv1/relu_7x7", DATA_BLOB, 64, 7, stride=2),
        MaxPooling("pool1/3x3_s2", ("conv1/7x7_s2",), "pool1/3x3_s2", 3, 2),
        _norm("pool1/norm1", "pool1/3x3_s2"),
        *_convolution("conv2/3x3_reduce", "conv2/relu_3x3_reduce", "pool1/norm1", 64, 1),
        *_convolution("conv2/3x3", "conv2/relu_3x3", "conv2/3x3_reduce", 192, 3),
        _norm("conv2/norm2", "conv2/3x3"),
        MaxPooling("pool2/3x3_s2", ("conv2/norm2",), "pool2/3x3_s2", 3, 2),
    ]
    last = "pool2/3x3_s2"
    auxiliary: dict[str, tuple[Layer, ...]] = {}
    for name, *outputs in MODULES:
        layers += _inception(f"inception_{name}", last, *outputs)
        last = f"inception_{name}/output"
        if name in CLASSIFIED:
            auxiliary[last] = tuple(_classifier(CLASSIFIED[name], last, num_classes))
        if name in POOLED:
            pool = f"{POOLED[name]}/3x3_s2"
            layers.append(MaxPooling(pool, (last,), pool, 3, 2))
            last = pool
    pool = "pool5/7x7_s1"
    layers += [
        AveragePooling(pool, (last,), pool, 7, 1),
        Dropout("pool5/drop_7x7_s1", (pool,), pool, ratio=0.4),
        InnerProduct("loss3/classifier", (pool,), "loss3/classifier", num_classes, XAVIER),
    ]
    return Network(
        "googlenet",
        3,
        crop_size,
        num_classes,
        tuple(layers),
        tuple(_outputs("loss3", "loss3/loss3", num_classes, weight=1)),
        auxiliary=auxiliary,
        title="GoogleNet",
        mean_values=(104, 117, 123),
        deploy_batch=10,
    )


def _inception(
    name: str,
    bottom: str,
    direct: int,
    reduced3: int,
    outputs3: int,
    reduced5: int,
    outputs5: int,
    pooled: int,
) -> list[Layer]:
    """Four ways side by side, whose outputs follow one another in the channels of ``<name>/output``."""

    def convolution(part: str, source: str, outputs: int, kernel: int) -> list[Layer]:
        return _convolution(f"{name}/{part}", f"{name}/relu_{part}", source, outputs, kernel)

    pool, ends = f"{name}/pool", ("1x1", "3x3", "5x5", "pool_proj")
    return [
        *convolution("1x1", bottom, direct, 1),
        *convolution("3x3_reduce", bottom, reduced3, 1),
        *convolution("3x3", f"{name}/3x3_reduce", outputs3, 3),
        *convolution("5x5_reduce", bottom, reduced5, 1),
        *convolution("5x5", f"{name}/5x5_reduce", outputs5, 5),
        MaxPooling(pool, (bottom,), pool, 3, 1, pad=1),
        *convolution("pool_proj", pool, pooled, 1),
        Concat(f"{name}/output", tuple(f"{name}/{end}" for end in ends), f"{name}/output"),
    ]


def _classifier(name: str, bottom: str, num_classes: int) -> list[Layer]:
    """An auxiliary classifier with its loss, which counts 0.3."""
    pool, convolution, hidden, scores = (
        f"{name}/{part}" for part in ("ave_pool", "conv", "fc", "classifier")
    )
    return [
        AveragePooling(pool, (bottom,), pool, 5, 3),
        *_convolution(convolution, f"{name}/relu_conv", pool, 128, 1),
        InnerProduct(hidden, (convolution,), hidden, 1024, XAVIER, FIFTH),
        ReLU(f"{name}/relu_fc", (hidden,), hidden),
        Dropout(f"{name}/drop_fc", (hidden,), hidden, ratio=0.7),
        InnerProduct(scores, (hidden,), scores, num_classes, XAVIER),
        *_outputs(name, f"{name}/loss", num_classes, weight=0.3),
    ]


def _outputs(name: str, loss: str, num_classes: int, *, weight: float) -> list[Layer]:
    read = (f"{name}/classifier", LABEL_BLOB)
    accuracies = [Accuracy(f"{name}/top-{k}", read, f"{name}/top-{k}", k) for k in (1, 5) if k <= num_classes]
    return [SoftmaxWithLoss(loss, read, f"{name}/{name}", loss_weight=weight), *accuracies]


def _norm(name: str, bottom: str) -> Layer:
    return LocalResponseNorm(name, (bottom,), name, channels=5, alpha=1e-4, beta=0.75)


def _convolution(
    name: str, relu: str, bottom: str, outputs: int, kernel: int, *, stride: int = 1
) -> list[Layer]:
    """A convolution that keeps the image's size but for its stride, and its ReLU."""
    return [
        Convolution(
            name,
            (bottom,),
            name,
            outputs,
            kernel,
            stride,
            pad=kernel // 2,
            weight_filler=XAVIER,
            bias_filler=FIFTH,
        ),
        ReLU(relu, (name,), name),
    ]
