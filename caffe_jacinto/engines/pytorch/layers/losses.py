"""Losses, and the accuracy."""

from __future__ import annotations

from collections.abc import Callable
from math import log, prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from caffe_jacinto.data.mean import read_blob
from caffe_jacinto.engines.pytorch.indices import LABEL, Indices
from caffe_jacinto.engines.pytorch.layer_setup import Blobs, Builder, Forward, LayerSetup
from caffe_jacinto.prototxt.dialects import Dialect

LEAST_PROBABILITY = 1e-20
"""Of which InfogainLoss and MultinomialLogisticLoss take the logarithm (kLOG_THRESHOLD)."""

LARGEST_LOSS = -log(1.17549435e-38)
"""Of one image: Caffe takes the logarithm of no less than FLT_MIN, which gives 87.3365."""


def softmax_with_loss(layer: LayerSetup) -> Forward:
    layer.takes(2, tops=2)
    axis = layer.axis(layer.parameters("softmax_param", "axis", also=("loss_param",)).axis)
    fields = layer.parameters(
        "loss_param", "ignore_label", "normalization", "normalize", also=("softmax_param",)
    )
    ignore = fields.ignore_label if fields.HasField("ignore_label") else None
    normalizer = _normalizer(fields)
    labels_of = _labels(layer, axis, ignore)
    both = len(layer.message.top) == 2

    def forward(blobs: Blobs, scores: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, ...]:
        rows = _rows(scores.float(), axis)
        loss: Tensor = _SoftmaxLoss.apply(
            rows, labels_of(labels).reshape(-1), ignore, normalizer, prod(scores.shape[:axis])
        )
        return (loss, torch.softmax(scores.detach().float(), axis)) if both else loss

    return forward


class _SoftmaxLoss(torch.autograd.Function):
    """The cross-entropy as Caffe has it: what is shown is clipped, and its gradient is not."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, labels: Tensor, ignore: int | None, normalizer: str, batch: int
    ) -> Tensor:
        logs = torch.log_softmax(rows, 1)
        counted = None
        if ignore is not None:
            counted = labels != ignore
            labels = torch.where(counted, labels, 0)
        losses = -logs.gather(1, labels[:, None])[:, 0]
        losses = losses.clamp(max=LARGEST_LOSS)
        if counted is not None:
            losses = torch.where(counted, losses, 0)
        divisor: Tensor | float = _divisor(normalizer, len(labels), batch, counted)
        ctx.save_for_backward(logs, labels)
        ctx.counted, ctx.divisor = counted, divisor
        return losses.sum() / divisor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logs, labels = ctx.saved_tensors
        rows = logs.exp()
        rows.scatter_add_(1, labels[:, None], rows.new_full((len(labels), 1), -1.0))
        if ctx.counted is not None:
            rows *= ctx.counted[:, None]
        return rows * (gradient / ctx.divisor), None, None, None, None


def _divisor(normalizer: str, labels: int, batch: int, counted: Tensor | None) -> Tensor | float:
    if normalizer == "VALID":
        return float(max(labels, 1)) if counted is None else counted.sum().clamp(min=1)
    return {"FULL": float(max(labels, 1)), "BATCH_SIZE": float(max(batch, 1)), "NONE": 1.0}[normalizer]


def _normalizer(fields: Any, default: str = "VALID") -> str:
    """The name of the LossParameter.NormalizationMode; ``normalize`` is the older way to say it."""
    if fields.HasField("normalization"):
        return str(type(fields).NormalizationMode.Name(fields.normalization))
    if fields.HasField("normalize"):
        return "VALID" if fields.normalize else "BATCH_SIZE"
    return default


def infogain_loss(layer: LayerSetup) -> Forward:
    """What a Caffe of the layer's dialect calls InfogainLoss."""
    fork = layer.dialect is Dialect.CAFFE_JACINTO
    return _infogain_of_probabilities(layer) if fork else _infogain_of_scores(layer)


def _infogain_of_probabilities(layer: LayerSetup) -> Forward:
    """caffe-jacinto's, of the time before stock Caffe's had a softmax: the first bottom is probabilities.

    The loss is - the sum over classes k of H[label, k] log(p[k]), p[k] no less than 1e-20, averaged over the
    batch.
    """
    layer.takes(2, 3)
    fields = layer.parameters("infogain_loss_param", "source", also=("loss_param",))
    classes = prod(layer.bottoms[0][1:])
    labels_of = _one_label_each(layer)
    matrix_of = _matrix_of(layer, fields.source, classes)

    def forward(blobs: Blobs, probabilities: Tensor, labels: Tensor, *given: Tensor) -> Tensor:
        rows = probabilities.float().reshape(len(probabilities), -1)
        logs = _shown_as(rows, rows.clamp(min=LEAST_PROBABILITY)).log()
        loss: Tensor = -(matrix_of(*given)[labels_of(labels).reshape(-1)] * logs).sum() / len(rows)
        return loss

    return forward


def _infogain_of_scores(layer: LayerSetup) -> Forward:
    """Stock Caffe's: softmax, and the logarithms of all probabilities weighted by the label's row of H.

    The loss of one place is - the sum over classes k of H[label, k] log(p[k]), p[k] no less than 1e-20. The
    matrix H comes from a .binaryproto or is the third bottom.
    """
    layer.takes(2, 3, tops=2)
    also = ("softmax_param", "loss_param", "infogain_loss_param")
    fields = layer.parameters("infogain_loss_param", "source", "axis", also=also)
    softmax_fields = layer.parameters("softmax_param", "axis", also=also)
    loss_fields = layer.parameters("loss_param", "ignore_label", "normalization", also=also)
    axis = layer.axis(fields.axis)
    if softmax_fields.HasField("axis") and layer.axis(softmax_fields.axis) != axis:
        layer.refuse("softmax_param.axis is not infogain_loss_param.axis; remove it")
    ignore = loss_fields.ignore_label if loss_fields.HasField("ignore_label") else None
    normalizer, classes = _normalizer(loss_fields), layer.bottoms[0][axis]
    labels_of = _labels(layer, axis, ignore)
    matrix_of = _matrix_of(layer, fields.source, classes)
    both = len(layer.message.top) == 2

    def forward(blobs: Blobs, scores: Tensor, labels: Tensor, *given: Tensor) -> Any:
        matrix = matrix_of(*given)
        logs = torch.log_softmax(_rows(scores.float(), axis), 1)
        logs = _shown_as(logs, logs.clamp(min=log(LEAST_PROBABILITY)))
        labels = labels_of(labels).reshape(-1)
        counted = None if ignore is None else labels != ignore
        losses = -(matrix[labels if counted is None else torch.where(counted, labels, 0)] * logs).sum(1)
        if counted is not None:
            losses = torch.where(counted, losses, 0)
        loss = losses.sum() / _divisor(normalizer, len(labels), prod(scores.shape[:axis]), counted)
        return (loss, torch.softmax(scores.detach().float(), axis)) if both else loss

    return forward


def _matrix_of(layer: LayerSetup, source: str, classes: int) -> Callable[..., Tensor]:
    """What gives the matrix H: from a file, or from the third bottom, with which it is called."""
    if len(layer.bottoms) == 2:
        stored = _infogain_matrix(layer, source, classes).to(layer.device)
        return lambda: stored
    if prod(layer.bottoms[2]) != classes * classes:
        layer.refuse(f"its third bottom has to be {classes} x {classes}, and has {layer.bottoms[2]}")
    return lambda given: given.detach().float().reshape(classes, classes)


def _infogain_matrix(layer: LayerSetup, source: str, classes: int) -> Tensor:
    if not source:
        layer.refuse("needs infogain_loss_param.source or a third bottom: the matrix of its weights")
    dims, values = read_blob(Path(source), "file of an infogain matrix", "write it as a BlobProto")
    if values.size != classes * classes:
        layer.refuse(
            f"{source} has the shape {dims}; for {classes} classes it has to be {classes} x {classes}"
        )
    return torch.from_numpy(values).reshape(classes, classes)


def _shown_as(values: Tensor, shown: Tensor) -> Tensor:
    """``shown``, with the gradient of ``values``: Caffe limits what it shows, and not its gradient."""
    return values + (shown - values).detach()


def multinomial_logistic_loss(layer: LayerSetup) -> Forward:
    """- log of the label's probability, no less than 1e-20, averaged over the batch."""
    layer.takes(2)
    layer.only("loss_param")
    labels_of = _one_label_each(layer)

    def forward(blobs: Blobs, probabilities: Tensor, labels: Tensor) -> Tensor:
        rows = probabilities.float().reshape(len(probabilities), -1)
        chosen = rows.gather(1, labels_of(labels).reshape(-1, 1))
        return -_shown_as(chosen, chosen.clamp(min=LEAST_PROBABILITY)).log().sum() / len(rows)

    return forward


def hinge_loss(layer: LayerSetup) -> Forward:
    """Max(0, 1 - t x) over all classes, t 1 for the label and -1 for others; L2: its square. By image."""
    layer.takes(2)
    fields = layer.parameters("hinge_loss_param", "norm", also=("loss_param",))
    squared = fields.norm == type(fields).L2
    labels_of = _one_label_each(layer)

    def forward(blobs: Blobs, scores: Tensor, labels: Tensor) -> Tensor:
        rows = scores.float().reshape(len(scores), -1)
        signs = torch.ones_like(rows).scatter_(1, labels_of(labels).reshape(-1, 1), -1.0)
        margins = torch.relu(1 + signs * rows)
        return (margins.square() if squared else margins).sum() / len(rows)

    return forward


def _one_label_each(layer: LayerSetup) -> Indices:
    """The labels, the second bottom, of a layer that takes one for each item."""
    scores, labels = layer.bottoms[:2]
    if prod(labels) != scores[0]:
        layer.refuse(f"{prod(labels)} labels for {scores[0]} items; give one for each")
    return layer.indices_of(1, LABEL, prod(scores[1:]))


def euclidean_loss(layer: LayerSetup) -> Forward:
    """The sum of the squared differences of two bottoms, over twice the batch; both get a gradient."""
    layer.takes(2)
    layer.only("loss_param")
    first, second = layer.bottoms
    if first[:1] != second[:1] or prod(first) != prod(second):
        layer.refuse(f"its bottoms have different sizes: {first}, {second}")

    def forward(blobs: Blobs, first: Tensor, second: Tensor) -> Tensor:
        difference = first.float() - second.float().reshape(first.shape)
        return difference.square().sum() / (2 * len(first))

    return forward


def sigmoid_cross_entropy_loss(layer: LayerSetup) -> Forward:
    """- t log(s) - (1 - t) log(1 - s), s the sigmoid of a score and t its target, from 0 to 1.

    Divided by the batch, unless ``normalization`` says otherwise.
    """
    layer.takes(2)
    fields = layer.parameters("loss_param", "ignore_label", "normalization", "normalize")
    ignore = fields.ignore_label if fields.HasField("ignore_label") else None
    normalizer = _normalizer(fields, "BATCH_SIZE")
    if prod(layer.bottoms[0]) != prod(layer.bottoms[1]) or layer.bottoms[0][:1] != layer.bottoms[1][:1]:
        layer.refuse(f"{layer.bottoms[1]} targets for {layer.bottoms[0]} scores; give one for each")

    def forward(blobs: Blobs, scores: Tensor, targets: Tensor) -> Tensor:
        targets = targets.detach().float().reshape(scores.shape)
        losses = F.binary_cross_entropy_with_logits(scores.float(), targets, reduction="none")
        counted = None
        if ignore is not None:
            counted = targets.trunc() != ignore
            losses = torch.where(counted, losses, 0)
        return losses.sum() / _divisor(normalizer, losses.numel(), len(scores), counted)

    return forward


def contrastive_loss(layer: LayerSetup) -> Forward:
    """Of pairs (Hadsell et al. 2006): d^2 where they are similar (the third bottom is not 0), else
    max(margin - d, 0)^2, over twice the batch; d is their distance. The legacy version: max(margin - d^2, 0).
    """
    layer.takes(3)
    fields = layer.parameters("contrastive_loss_param", "margin", "legacy_version", also=("loss_param",))
    margin, legacy = fields.margin, fields.legacy_version
    first, second, similar = layer.bottoms
    if first != second or prod(first[2:]) != 1 or len(first) < 2 or prod(similar) != first[0]:
        layer.refuse("takes two bottoms of pairs x channels, and one number for each pair")

    def forward(blobs: Blobs, first: Tensor, second: Tensor, similar: Tensor) -> Tensor:
        alike = similar.detach().reshape(-1).trunc() != 0
        difference = (first.float() - second.float()).flatten(1)
        loss: Tensor = _ContrastiveLoss.apply(difference, alike, margin, legacy)
        return loss

    return forward


class _ContrastiveLoss(torch.autograd.Function):
    """From the differences of pairs. The gradient has Caffe's 1e-4 beside the distance that it divides by."""

    @staticmethod
    def forward(ctx: Any, difference: Tensor, alike: Tensor, margin: float, legacy: bool) -> Tensor:
        squares = difference.square().sum(1)
        distances = squares.sqrt()
        room = (margin - (squares if legacy else distances)).clamp(min=0)
        losses = torch.where(alike, squares, room if legacy else room.square())
        slopes = -(room > 0).float() if legacy else -room / (distances + 1e-4)
        ctx.save_for_backward(difference, torch.where(alike, 1.0, slopes))
        return losses.sum() / (2 * len(difference))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        difference, slopes = ctx.saved_tensors
        return difference * slopes[:, None] * (gradient / len(difference)), None, None, None


def accuracy(layer: LayerSetup) -> Forward:
    """The share of labels that are among the ``top_k`` best scores; a second top has it for each class."""
    layer.takes(2, tops=2)
    fields = layer.parameters("accuracy_param", "top_k", "axis", "ignore_label")
    axis = layer.axis(fields.axis)
    ignore = fields.ignore_label if fields.HasField("ignore_label") else None
    classes, top_k = layer.bottoms[0][axis], fields.top_k
    if not 1 <= top_k <= classes:
        layer.refuse(f"accuracy_param.top_k {top_k} of {classes} classes; it has to be from 1 to {classes}")
    labels_of = _labels(layer, axis, ignore)
    by_class = len(layer.message.top) == 2

    def forward(blobs: Blobs, scores: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, ...]:
        with torch.no_grad():
            rows = _rows(scores.detach().float(), axis)
            labels = labels_of(labels).reshape(-1)
            counted = torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels != ignore
            labels = torch.where(counted, labels, 0)
            # Other classes that score as much as the label's own count as better.
            as_good = (rows >= rows.gather(1, labels[:, None])).sum(1)
            right = (as_good <= top_k) & counted
            share = torch.div(right.sum(), counted.sum())
            if not by_class:
                return share
            of_class = F.one_hot(labels, classes) * counted[:, None]
            return share, (of_class * right[:, None]).sum(0) / of_class.sum(0).clamp(min=1)

    return forward


def _rows(scores: Tensor, axis: int) -> Tensor:
    """One row of class scores for each label, in the labels' order."""
    return scores if scores.dim() == 2 else scores.movedim(axis, -1).reshape(-1, scores.shape[axis])


def _labels(layer: LayerSetup, axis: int, ignored: int | None) -> Indices:
    """The labels of a layer that takes one for each place of the scores but their ``axis``."""
    scores, labels = layer.bottoms[:2]
    if prod(labels) != prod(scores) // max(scores[axis], 1):
        layer.refuse(
            f"{prod(labels)} labels for scores of shape {scores}: give one for each place but axis {axis}"
        )
    return layer.indices_of(1, LABEL, scores[axis], ignored)


LAYERS: dict[str, Builder] = {
    "Accuracy": accuracy,
    "ContrastiveLoss": contrastive_loss,
    "EuclideanLoss": euclidean_loss,
    "HingeLoss": hinge_loss,
    "InfogainLoss": infogain_loss,
    "MultinomialLogisticLoss": multinomial_logistic_loss,
    "SigmoidCrossEntropyLoss": sigmoid_cross_entropy_loss,
    "SoftmaxWithLoss": softmax_with_loss,
}
