"""Layers as plain data, the same for every dialect; templates/prototxt/layers.j2 writes them as text.

Every layer has a name, the blobs that it reads (``bottoms``) and the blob that it writes (``top``). A layer
whose top is its bottom works in place. Images are batch x channels x height x width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from caffe_jacinto.prototxt.dialects import scale_name


@dataclass(frozen=True)
class Layer:
    """What all layers have."""

    name: str
    bottoms: tuple[str, ...]
    top: str

    @property
    def bottom(self) -> str:
        """The one blob that the layer reads."""
        (only,) = self.bottoms
        return only

    @property
    def kind(self) -> str:
        """The name of the layer's class, which is the name of its template."""
        return type(self).__name__


@dataclass(frozen=True)
class Shift(Layer):
    """Add a constant to every value; it is not trained."""

    value: float


@dataclass(frozen=True)
class Filler:
    """Initial values of weights or biases: Caffe's FillerParameter; only what is given is written."""

    type: str
    value: float | None = None
    std: float | None = None
    fan_out: bool = False
    """For "msra": the variance follows from the outputs of a weight, not from its inputs."""


MSRA = Filler("msra")
ZERO = Filler("constant", value=0)


@dataclass(frozen=True)
class Convolution(Layer):
    """Square kernels in ``group`` groups, and a bias for each output; sizes in pixels."""

    outputs: int
    kernel: int
    stride: int = 1
    pad: int = 0
    group: int = 1
    bias: bool = True
    weight_filler: Filler | None = MSRA
    bias_filler: Filler | None = ZERO
    bias_decay: float = 0.0
    """Weight decay of the biases, as a multiple of the weights'."""

    bias_lr: float = 2.0
    """Learning rate of the biases, as a multiple of the weights'."""

    caffe_engine: bool = False
    """Whether Caffe's own convolution is chosen, not cuDNN's."""

    lr_mult: float = 1.0
    """Learning rate as a multiple of the published one; 0 freezes the layer, weight decay included."""


@dataclass(frozen=True)
class BatchNorm(Layer):
    """Normalize each channel, then scale and shift it by two trained values."""

    moving_average_fraction: float = 0.999
    eps: float = 1e-5
    decay: float = 1.0
    """Weight decay of scale and shift, as a multiple of the weights'."""

    shift_lr: float = 1.0
    """Learning rate of the shift, as a multiple of the scale's. The fork always takes 1, and decays both."""

    lr_mult: float = 1.0
    """Learning rate as a multiple of the published one; 0 freezes scale, shift and statistics."""

    @property
    def scale_name(self) -> str:
        """The name of stock Caffe's layer that scales and shifts."""
        return scale_name(self.name)


@dataclass(frozen=True)
class ReLU(Layer):
    """Negative values become zero."""


@dataclass(frozen=True)
class MaxPooling(Layer):
    """The largest value of each ``kernel`` x ``kernel`` window; the output's size is rounded up."""

    kernel: int
    stride: int
    pad: int = 0


@dataclass(frozen=True)
class AveragePooling(Layer):
    """The mean of each ``kernel`` x ``kernel`` window; the output's size is rounded up."""

    kernel: int
    stride: int


@dataclass(frozen=True)
class LocalResponseNorm(Layer):
    """Divide each value by (1 + alpha/channels x the sum of its neighbours' squares) to the power of beta.

    Neighbours are the same pixel of the ``channels`` nearest channels, itself included.
    """

    channels: int
    alpha: float
    beta: float


@dataclass(frozen=True)
class Dropout(Layer):
    """In training, a fraction ``ratio`` of the values becomes zero, at random, and the rest grow to match."""

    ratio: float


@dataclass(frozen=True)
class Sum(Layer):
    """The sum of blobs of one shape, value by value."""


@dataclass(frozen=True)
class Concat(Layer):
    """The channels of blobs of one height and width, one blob after the other."""


@dataclass(frozen=True)
class GlobalAveragePooling(Layer):
    """The mean of each channel: batch x channels x 1 x 1."""


@dataclass(frozen=True)
class InnerProduct(Layer):
    """A fully connected layer: batch x outputs."""

    outputs: int
    weight_filler: Filler | None = MSRA
    bias_filler: Filler | None = ZERO
    bias_decay: float = 0.0
    """Weight decay of the biases, as a multiple of the weights'."""

    bias_lr: float = 2.0
    """Learning rate of the biases, as a multiple of the weights'."""

    lr_mult: float = 1.0
    """Learning rate as a multiple of the published one; 0 freezes the layer, weight decay included."""


@dataclass(frozen=True)
class SoftmaxWithLoss(Layer):
    """The loss: cross-entropy of the softmax of the scores against the labels, averaged over the batch."""

    propagate_down: tuple[bool, ...] = ()
    """Whether gradients flow to each bottom; empty leaves that to Caffe."""

    loss_weight: float = 1.0


@dataclass(frozen=True)
class Accuracy(Layer):
    """The fraction of images whose label is among the ``top_k`` largest scores."""

    top_k: int
    in_training: bool = False
    """Whether it is also measured when training."""


@dataclass(frozen=True)
class Softmax(Layer):
    """Scores to probabilities."""


@dataclass(frozen=True)
class Data(Layer):
    """Batches of images and labels from an LMDB; crops are random in training, central in testing."""

    source: str
    """The LMDB's folder."""

    batch_size: int
    channels: int
    crop_size: int
    mirror: bool
    """Mirror every other image, at random."""

    label_top: str
    mean_values: tuple[float, ...] = ()
    """Subtracted from every pixel, one for each channel."""

    mean_file: str | None = None
    """A .binaryproto with the mean image, which is subtracted before the crop."""

    scale: float | None = None
    """Every pixel is multiplied by this, once the mean is subtracted."""

    augmentation: Mapping[str, float] = field(default_factory=dict)
    """Fields of transform_param that Caffe does not have."""


@dataclass(frozen=True)
class Other(Layer):
    """A layer of any type of Caffe's that has no class here, in the same words in both dialects."""

    type: str
    """LayerParameter.type, like ``Swish``."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the layer by name: numbers, texts, flags, `Name` for enumerators, mappings for messages."""


@dataclass(frozen=True)
class Network:
    """A classifier from the image to its class scores, and how it is trained and tested; no text."""

    name: str
    """Its name in the registry."""

    channels: int
    """Of the input, whose blob is called ``data``."""

    crop_size: int
    """Height and width of the input."""

    num_classes: int
    layers: tuple[Layer, ...]
    """In order of computation; the last one gives the class scores, batch x num_classes."""

    outputs: tuple[Layer, ...]
    """The loss and accuracies of training and testing, which read the scores and the labels."""

    auxiliary: Mapping[str, tuple[Layer, ...]] = field(default_factory=dict)
    """Layers of training and testing only, classifiers with a loss of their own, by the layer of `layers`
    that they follow."""

    title: str | None = None
    """The ``name`` in the prototxts; without one, the network's name."""

    title_says_stage: bool = False
    """Whether ``_train``, ``_test`` or ``_deploy`` follows the title."""

    mean_values: tuple[float, ...] = ()
    """Subtracted from the image's channels, unless a mean image is."""

    scale: float | None = None
    """The image is multiplied by this, once the mean is subtracted."""

    mean_image: bool = False
    """Whether the network needs the data set's mean image."""

    deploy_batch: int = 1
    """Images in the deploy prototxt's input."""

    deploy_fillers: bool = True
    """Whether the deploy prototxt holds fillers, which have no effect there."""

    @property
    def trained_layers(self) -> tuple[Layer, ...]:
        """The layers of training and testing, the auxiliary ones at their places."""
        return tuple(one for layer in self.layers for one in (layer, *self.auxiliary.get(layer.name, ())))

    @property
    def scores(self) -> str:
        """The blob of class scores."""
        return self.layers[-1].top

    @property
    def has_batch_norm(self) -> bool:
        """Whether there are running statistics, which can lag behind the weights."""
        return any(isinstance(layer, BatchNorm) for layer in self.layers)


DATA_BLOB = "data"
LABEL_BLOB = "label"


def loss_and_accuracies(scores: str, num_classes: int) -> tuple[Layer, ...]:
    """Loss, top-1 and top-5; Caffe refuses a top-5 of fewer than 5 classes."""
    read = (scores, LABEL_BLOB)
    accuracies = [
        Accuracy(f"accuracy/top{k}", read, f"accuracy/top{k}", k) for k in (1, 5) if k <= num_classes
    ]
    return (SoftmaxWithLoss("loss", read, "loss", propagate_down=(True, False)), *accuracies)


def conv_bn_relu(
    bottom: str, name: str, outputs: int, kernel: int, *, stride: int = 1, pad: int, group: int = 1
) -> tuple[Layer, ...]:
    """A convolution, then its batch norm ``<name>/bn`` and ReLU ``<name>/relu`` in place on blob ``name``."""
    return (
        Convolution(name, (bottom,), name, outputs, kernel, stride, pad, group),
        BatchNorm(f"{name}/bn", (name,), name, moving_average_fraction=0.99, eps=1e-4),
        ReLU(f"{name}/relu", (name,), name),
    )
