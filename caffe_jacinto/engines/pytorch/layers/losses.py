"""Losses, and the accuracy."""

from __future__ import annotations

from math import log, prod
from typing import Any

import torch
from torch import Tensor

from caffe_jacinto.engines.pytorch.layer_setup import Blobs, Builder, Forward, LayerSetup

LARGEST_LOSS = -log(1.17549435e-38)
"""Of one image: Caffe takes the logarithm of no less than FLT_MIN, which gives 87.3365."""


def softmax_with_loss(layer: LayerSetup) -> Forward:
    layer.takes(2, tops=2)
    axis = layer.axis(layer.parameters("softmax_param", "axis", also=("loss_param",)).axis)
    fields = layer.parameters(
        "loss_param", "ignore_label", "normalization", "normalize", also=("softmax_param",)
    )
    ignore = fields.ignore_label if fields.HasField("ignore_label") else None
    normalizer = _normalizer(layer, fields)
    _check_labels(layer, axis)
    both = len(layer.message.top) == 2

    def forward(blobs: Blobs, scores: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, ...]:
        rows = _rows(scores.float(), axis)
        loss: Tensor = _SoftmaxLoss.apply(
            rows, labels.reshape(-1).long(), ignore, normalizer, prod(scores.shape[:axis])
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


def _normalizer(layer: LayerSetup, fields: Any) -> str:
    """The name of the LossParameter.NormalizationMode; ``normalize`` is the older way to say it."""
    if fields.HasField("normalize") and not fields.HasField("normalization"):
        return "VALID" if fields.normalize else "BATCH_SIZE"
    return str(type(fields).NormalizationMode.Name(fields.normalization))


def accuracy(layer: LayerSetup) -> Forward:
    layer.takes(2)
    fields = layer.parameters("accuracy_param", "top_k", "axis", "ignore_label")
    axis = layer.axis(fields.axis)
    ignore = fields.ignore_label if fields.HasField("ignore_label") else None
    classes, top_k = layer.bottoms[0][axis], fields.top_k
    if not 1 <= top_k <= classes:
        layer.refuse(f"accuracy_param.top_k {top_k} of {classes} classes; it has to be from 1 to {classes}")
    _check_labels(layer, axis)

    def forward(blobs: Blobs, scores: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            rows = _rows(scores.detach().float(), axis)
            labels = labels.reshape(-1).long()
            counted = torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels != ignore
            labels = torch.where(counted, labels, 0)
            # Other classes that score as much as the label's own count as better.
            as_good = (rows >= rows.gather(1, labels[:, None])).sum(1)
            right = (as_good <= top_k) & counted
            return torch.div(right.sum(), counted.sum())

    return forward


def _rows(scores: Tensor, axis: int) -> Tensor:
    """One row of class scores for each label, in the labels' order."""
    return scores if scores.dim() == 2 else scores.movedim(axis, -1).reshape(-1, scores.shape[axis])


def _check_labels(layer: LayerSetup, axis: int) -> None:
    scores, labels = layer.bottoms
    if prod(labels) != prod(scores) // max(scores[axis], 1):
        layer.refuse(
            f"{prod(labels)} labels for scores of shape {scores}: give one for each place but axis {axis}"
        )


LAYERS: dict[str, Builder] = {
    "Accuracy": accuracy,
    "SoftmaxWithLoss": softmax_with_loss,
}
