"""Before the training: whether each sparse stage of a run can reach its target, and what would do."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import count_of
from caffe_jacinto.engines.contract import ImageShape, StageFiles, data_shapes, stage_solver
from caffe_jacinto.netspec.graph import TRAIN, counted_convolutions, groups_of, messages_in, nodes_of
from caffe_jacinto.netspec.layer_types import is_known
from caffe_jacinto.netspec.shapes import blob_shapes
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.pruning.reach import (
    CountedConvolution,
    Reach,
    no_zeros,
    reach,
    thresholds_needed,
    zeros_in,
)
from caffe_jacinto.pruning.rule import factor_cap, step_iterations
from caffe_jacinto.recipes.model import SparseSettings
from caffe_jacinto.runs.plan import RunPlan, StagePlan

if TYPE_CHECKING:
    from caffe_jacinto.pruning.reach import Zeros


class Shortfall(NamedTuple):
    """Why a stage cannot reach its target."""

    message: str
    useless: bool
    """Whether the stage would not zero a single weight."""


def shortfalls(
    run: RunPlan,
    stages: Sequence[StagePlan],
    texts: Mapping[str, StageFiles],
    image_shapes: Mapping[str, ImageShape],
) -> list[Shortfall]:
    """The sparse stages among ``stages`` that cannot reach their targets; see `pruning.reach`.

    ``texts`` are the stages' files; stages without are not looked at.
    """
    found: list[Shortfall] = []
    if not any(plan.stage.sparse for plan in stages):
        return found
    ends: dict[Path, Zeros] = {}
    for plan in stages:
        if plan.name not in texts:
            continue
        convolutions = counted(texts[plan.name], run.engine.info.dialect, image_shapes)
        zeros = _start(run, plan, convolutions, ends)
        sparse = plan.stage.sparse
        if sparse is not None:
            reached = reach(convolutions, sparse, plan.max_iter, zeros)
            if reached.sparsity < sparse.target:
                found.append(_shortfall(plan, convolutions, sparse, zeros, reached))
            zeros = reached.zeros
        ends[plan.final_weights] = zeros  # of a dense stage this is more than is likely to be left
    return found


def counted(
    files: StageFiles, dialect: Dialect, image_shapes: Mapping[str, ImageShape]
) -> list[CountedConvolution]:
    """The convolutions of a stage's training network whose zeros count as sparsity.

    Raises:
        UserError: the files do not parse.
    """
    solver = stage_solver(files, dialect)
    layers = {layer.name: layer for layer in messages_in(solver.train_net)}
    shapes = blob_shapes(solver.train_net, TRAIN, data_shapes(solver.train_net, image_shapes))
    frozen = solver.frozen_layers()
    return [
        CountedConvolution(
            name,
            tuple(dim for dim in shapes[name][0] if dim is not None),
            groups_of(layers[name]),
            learns=name not in frozen,
        )
        for name in counted_convolutions(nodes_of(layers.values()))
        if name in shapes and is_known(shapes[name][0])
    ]


def _start(
    run: RunPlan, plan: StagePlan, convolutions: Sequence[CountedConvolution], ends: Mapping[Path, Zeros]
) -> Zeros:
    """The zeros that the stage starts with, at most."""
    none = no_zeros(convolutions)
    if plan.start_weights is None:
        return none
    try:
        found = ends.get(plan.start_weights) or zeros_in(plan.start_weights, convolutions)
    except UserError:
        return none  # the check of the start weights reports it
    left_out = run.left_out(plan)
    return {name: none[name] if name in left_out else found.get(name, none[name]) for name in none}


def _shortfall(
    plan: StagePlan,
    convolutions: Sequence[CountedConvolution],
    sparse: SparseSettings,
    zeros: Zeros,
    reached: Reach,
) -> Shortfall:
    key = f"stages.{plan.name}"
    pruned = [convolution for convolution in convolutions if convolution.is_pruned]
    if not pruned:
        return Shortfall(
            f"stage {plan.name}: no weight would become zero: the pruning rule takes only convolutions that "
            "learn, are not depthwise, have at least 32 inputs or outputs and kernels larger than 2x2, and "
            f"the network has none; remove {key}.sparse",
            useless=True,
        )
    remedies = _remedies(key, plan.max_iter, convolutions, sparse, zeros)
    if reached.steps and not reached.thresholds:
        return Shortfall(
            f"stage {plan.name}: no weight would become zero: {key}.sparse.start_factor "
            f"{sparse.start_factor:g} is above {factor_cap(sparse.target):g}, where the schedule for a "
            f"target of {sparse.target:g} ends; lower start_factor",
            useless=True,
        )
    if not reached.thresholds:
        first = step_iterations(sparse, plan.max_iter + sparse.step_iter)[0]
        return Shortfall(
            f"stage {plan.name}: no weight would become zero: the first threshold comes after iteration "
            f"{first:,}, the first multiple of {key}.sparse.step_iter {sparse.step_iter} from start_iter "
            f"{sparse.start_iter} on, and training ends at max_iter {plan.max_iter}; {remedies}",
            useless=True,
        )
    alone = sum(convolution.weights for convolution in convolutions if not convolution.is_pruned)
    share = alone / sum(convolution.weights for convolution in convolutions)
    others = len(convolutions) - len(pruned)
    rest = (
        f" ({count_of(others, 'convolution')} with {share:.0%} of the weights "
        f"{'is' if others == 1 else 'are'} not pruned: see docs/sparsification.md)"
        if others
        else ""
    )
    return Shortfall(
        f"stage {plan.name}: the sparsity cannot reach the target of {sparse.target:g}: "
        f"{count_of(reached.thresholds, 'threshold')} before max_iter {plan.max_iter} "
        f"{'ends' if reached.thresholds == 1 else 'end'} at a factor of {reached.factor:g}, which makes at "
        f"most {_down(reached.sparsity)} of the convolutions' weights zero{rest}; {remedies}",
        useless=False,
    )


def _remedies(
    key: str,
    max_iter: int,
    convolutions: Sequence[CountedConvolution],
    sparse: SparseSettings,
    zeros: Zeros,
) -> str:
    """What reaches the target, one value changed and the others as they are."""
    needed = thresholds_needed(convolutions, sparse, zeros)
    if needed is None:
        return f"{key}.sparse.target={_highest_target(convolutions, sparse, zeros):g} would do"
    steps = step_iterations(sparse, 2**62)
    ways = [f"{key}.solver.max_iter={steps[needed - 1] + 1}"]
    closer = (max_iter - sparse.start_iter) // needed
    if closer:
        ways.append(f"{key}.sparse.step_iter={closer}")
    larger = _larger_step(max_iter, convolutions, sparse, zeros)
    if larger is not None:
        ways.append(f"{key}.sparse.step_factor={larger:g}")
    *others, last = ways
    return f"{', '.join(others)} or {last} would do" if others else f"{last} would do"


def _highest_target(
    convolutions: Sequence[CountedConvolution], sparse: SparseSettings, zeros: Zeros
) -> float:
    """The highest target, in thousandths, that the schedule can reach. A lower one also ends it earlier."""
    for thousandths in range(int(sparse.target * 1000), 0, -1):
        changed = sparse.model_copy(update={"target": thousandths / 1000})
        if reach(convolutions, changed, None, zeros).sparsity >= changed.target:
            return changed.target
    return 0.0


def _larger_step(
    max_iter: int, convolutions: Sequence[CountedConvolution], sparse: SparseSettings, zeros: Zeros
) -> float | None:
    """The smallest ``step_factor``, in thousandths, that reaches the target before ``max_iter``."""

    def reached(thousandths: int) -> float:
        changed = sparse.model_copy(update={"step_factor": thousandths / 1000})
        return reach(convolutions, changed, max_iter, zeros).sparsity

    choices = range(1, 1000)
    found = bisect_left(choices, sparse.target, key=reached)
    return choices[found] / 1000 if found < len(choices) else None


def _down(sparsity: float) -> str:
    """Three digits, never more than ``sparsity``."""
    return f"{math.floor(sparsity * 1000) / 1000:g}"
