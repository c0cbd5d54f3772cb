"""A stage that learns from a teacher: the loss that its training network gets beside its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from caffe_jacinto.common.files import expanded
from caffe_jacinto.networks.layers import DATA_BLOB, Layer, Other, SoftmaxWithLoss
from caffe_jacinto.recipes.model import Recipe

LAYER = "distillation"
"""The layer and blob of the loss."""


def taught(
    layers: tuple[Layer, ...], recipe: Recipe, stage_name: str, scores: str, folder: str
) -> tuple[Layer, ...]:
    """``layers`` with the part of the weight of each loss on what the stage's teacher says.

    ``scores`` is the blob of class scores, ``folder`` that of the stage in a run.
    """
    files = teacher_files(recipe, stage_name, folder)
    if files is None:
        return layers
    net, weights = files
    stage = recipe.stages[stage_name]
    share = stage.teacher_weight
    parameters = {"net": net, "weights": weights, "temperature": stage.temperature}
    loss = {"loss_weight": share, "distillation_param": parameters}
    own = tuple(_lighter(layer, 1 - share) for layer in layers)
    return (*own, Other(LAYER, (scores, DATA_BLOB), LAYER, "DistillationLoss", loss))


def teacher_files(recipe: Recipe, stage_name: str, folder: str) -> tuple[str, str] | None:
    """The deploy.prototxt and the weights of a stage's teacher; None: it has none."""
    teacher = recipe.teacher_of(stage_name)
    if teacher is None:
        return None
    if teacher.stage is None:
        own = Path(folder, "deploy.prototxt")
        return str(teacher.prototxt or own), str(expanded(str(teacher.weights)))
    place = Path(folder).parent / teacher.stage
    return str(place / "deploy.prototxt"), str(place / recipe.weights_name(teacher.stage))


def _lighter(layer: Layer, factor: float) -> Layer:
    if isinstance(layer, SoftmaxWithLoss):
        return replace(layer, loss_weight=layer.loss_weight * factor)
    if isinstance(layer, Other) and layer.type == "InfogainLoss":
        weight = layer.parameters.get("loss_weight", 1.0) * factor
        return replace(layer, parameters={**layer.parameters, "loss_weight": weight})
    return layer
