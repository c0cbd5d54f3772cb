"""Before the training: whether each sparse stage of a run can reach its target, and what would do."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.text import count_of
from caffe_jacinto.engines.contract import ImageShape, StageFiles, data_shapes, stage_solver
from caffe_jacinto.netspec.graph import TRAIN, messages_in
from caffe_jacinto.netspec.layer_types import is_known
from caffe_jacinto.netspec.shapes import blob_shapes
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.pruning.layers import (
    MIN_CHANNELS,
    CountedLayer,
    find_counted,
    idle_targets,
    is_halved,
    target_of,
    why_not_pruned,
    wrong_names,
)
from caffe_jacinto.pruning.reach import Reach, no_zeros, reach, thresholds_needed, zeros_in
from caffe_jacinto.pruning.schedule import factor_cap, step_iterations
from caffe_jacinto.recipes.model import SparseSettings
from caffe_jacinto.runs.plan import RunPlan, StagePlan

if TYPE_CHECKING:
    from caffe_jacinto.pruning.reach import Zeros


NAMES = 3
"""Layers that a message names for each reason."""


WORTH_SAYING = 0.01
"""Share of the weights from which on it matters that layers are pruned by less than the others."""


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
        network = _Network(texts[plan.name], run.engine.info.dialect, image_shapes)
        counted = network.counted(inner_products=run.recipe.counts_inner_products(plan.name))
        zeros = _start(run, plan, counted, ends)
        sparse = plan.stage.sparse
        if sparse is not None:
            wrong = [
                f"stages.{plan.name}.sparse.{key}: {what}"
                for key, what in wrong_names(network.layers, sparse)
            ]
            if wrong:
                found += [Shortfall(line, useless=True) for line in wrong]
                continue
            found += [
                Shortfall(f"stages.{plan.name}.sparse.targets: {what}", useless=False)
                for what in idle_targets(counted, sparse)
            ]
            reached = reach(counted, sparse, plan.max_iter, zeros)
            if reached.sparsity < sparse.target:
                others = network if run.engine.info.own_rule else None
                found.append(_shortfall(plan, counted, sparse, zeros, reached, others))
            zeros = reached.zeros
        ends[plan.final_weights] = zeros  # of a dense stage this is more than is likely to be left
    return found


class _Network:
    """A stage's training network."""

    def __init__(self, files: StageFiles, dialect: Dialect, image_shapes: Mapping[str, ImageShape]) -> None:
        """Raises UserError if the files do not parse."""
        solver = stage_solver(files, dialect)
        self.layers = messages_in(solver.train_net)
        self._shapes = blob_shapes(solver.train_net, TRAIN, data_shapes(solver.train_net, image_shapes))
        self._frozen = solver.frozen_layers()

    def counted(self, *, inner_products: bool) -> list[CountedLayer]:
        """The layers whose zeros count as sparsity; those whose shape is not known are left out."""
        return find_counted(self.layers, self._shape_of, inner_products=inner_products, frozen=self._frozen)

    def _shape_of(self, name: str) -> tuple[int, ...] | None:
        shape = self._shapes[name][0] if name in self._shapes else None
        return tuple(dim for dim in shape if dim is not None) if shape and is_known(shape) else None


def _start(
    run: RunPlan, plan: StagePlan, counted: Sequence[CountedLayer], ends: Mapping[Path, Zeros]
) -> Zeros:
    """The zeros that the stage starts with, at most."""
    none = no_zeros(counted)
    if plan.start_weights is None:
        return none
    try:
        found = ends.get(plan.start_weights) or zeros_in(plan.start_weights, counted)
    except UserError:
        return none  # the check of the start weights reports it
    left_out = run.left_out(plan)
    return {name: none[name] if name in left_out else found.get(name, none[name]) for name in none}


def _shortfall(
    plan: StagePlan,
    counted: Sequence[CountedLayer],
    sparse: SparseSettings,
    zeros: Zeros,
    reached: Reach,
    network: _Network | None,
) -> Shortfall:
    """``network``: where another rule may be suggested."""
    key = f"stages.{plan.name}"
    reasons = "; ".join(held_back(counted, sparse))
    back = f" ({reasons})" if reasons else ""
    if all(why_not_pruned(layer, sparse) for layer in counted):
        other = _another_rule(key, plan.max_iter, counted, sparse, zeros, network)
        return Shortfall(
            f"stage {plan.name}: no weight would become zero: the pruning rule takes none of the network's "
            f"layers{back}; {f'{other}, or ' if other else ''}remove {key}.sparse",
            useless=True,
        )
    remedies = _remedies(key, plan.max_iter, counted, sparse, zeros, network)
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
    kinds = "convolutions' and inner products'" if sparse.inner_products else "convolutions'"
    ends = (
        f"{count_of(reached.thresholds, 'threshold')} before max_iter {plan.max_iter} "
        f"{'ends' if reached.thresholds == 1 else 'end'} at a factor of {reached.factor:g}, "
    )
    if not reached.sparsity:
        return Shortfall(
            f"stage {plan.name}: no weight would become zero: {ends}which is less than one weight of those "
            f"that are pruned together{back}; {remedies}",
            useless=True,
        )
    return Shortfall(
        f"stage {plan.name}: the sparsity cannot reach the target of {sparse.target:g}: {ends}which makes at "
        f"most {_down(reached.sparsity)} of the {kinds} weights zero{back}; {remedies}",
        useless=False,
    )


def held_back(counted: Sequence[CountedLayer], sparse: SparseSettings) -> list[str]:
    """The layers that keep the sparsity down, by the reason, the most weights first."""
    reasons: dict[str, list[CountedLayer]] = {}
    for layer in counted:
        reason, own = why_not_pruned(layer, sparse), target_of(layer, sparse)
        if reason is not None:
            reasons.setdefault(f"not pruned, {reason}", []).append(layer)
        elif own is not None and own < sparse.target:
            reasons.setdefault(f"target of {own:g}", []).append(layer)
        elif is_halved(layer, sparse):
            reason = f"pruned by half, fewer than {MIN_CHANNELS} inputs or outputs"
            reasons.setdefault(reason, []).append(layer)
    every = sum(layer.weights for layer in counted)

    def weights(layers: Sequence[CountedLayer]) -> int:
        return sum(layer.weights for layer in layers)

    def text(reason: str, layers: list[CountedLayer]) -> str:
        largest = sorted(layers, key=lambda layer: -layer.weights)
        names = ", ".join(layer.name for layer in largest[:NAMES])
        more = f" and {len(layers) - NAMES} more" if layers[NAMES:] else ""
        share = f"{count_of(len(layers), 'layer')} with {weights(layers) / every:.1%} of the weights"
        return f"{reason}: {share}, {names}{more}"

    ordered = sorted(reasons.items(), key=lambda item: -weights(item[1]))
    return [
        text(reason, layers)
        for reason, layers in ordered
        if reason.startswith("not pruned") or weights(layers) >= WORTH_SAYING * every
    ]


def _another_rule(
    key: str,
    max_iter: int,
    counted: Sequence[CountedLayer],
    sparse: SparseSettings,
    zeros: Zeros,
    network: _Network | None,
) -> str:
    """The smallest change of the rule that reaches the target; empty where there is none to suggest.

    Where the rule chooses layers by name, a suggestion could not know what that is for.
    """
    if network is None or sparse.layers or sparse.skip or sparse.targets or sparse.n_of_m is not None:
        return ""
    wide: dict[str, Any] = {"min_kernel": 1}
    every: dict[str, Any] = {"inner_products": True}
    changes = [wide, every, wide | every, {"by": "network"} | every, {"by": "network"} | wide | every]
    for change in changes:
        changed = sparse.model_copy(update=change)
        layers = network.counted(inner_products=changed.inner_products)
        start = {**no_zeros(layers), **zeros}
        if reach(layers, changed, None, start).sparsity >= changed.target:
            ways = [f"{key}.sparse.{name}={str(value).lower()}" for name, value in change.items()]
            ways += _more_time(key, max_iter, layers, changed, start)
            return f"{_together(ways)} would do"
    return ""


def _remedies(
    key: str,
    max_iter: int,
    counted: Sequence[CountedLayer],
    sparse: SparseSettings,
    zeros: Zeros,
    network: _Network | None,
) -> str:
    """What reaches the target, one value changed and the others as they are."""
    needed = thresholds_needed(counted, sparse, zeros)
    if needed is None:
        other = _another_rule(key, max_iter, counted, sparse, zeros, network)
        highest = _highest_target(counted, sparse, zeros)
        lower = [f"{key}.sparse.target={highest:g}"]
        if highest:
            changed = sparse.model_copy(update={"target": highest})
            lower += _more_time(key, max_iter, counted, changed, zeros)
        ways = [f"{_together(lower)} would do"] if highest or not other else []
        return ", and ".join([*ways, other] if other else ways)
    ways = [f"{key}.solver.max_iter={_iterations_of(needed, sparse)}"]
    closer = (max_iter - sparse.start_iter) // needed
    if closer:
        ways.append(f"{key}.sparse.step_iter={closer}")
    larger = _larger_step(max_iter, counted, sparse, zeros)
    if larger is not None:
        ways.append(f"{key}.sparse.step_factor={larger:g}")
    *others, last = ways
    return f"{', '.join(others)} or {last} would do" if others else f"{last} would do"


def _together(settings: Sequence[str]) -> str:
    """``a=1 with b=2 and c=3``."""
    first, *others = settings
    return f"{first} with {' and '.join(others)}" if others else first


def _more_time(
    key: str, max_iter: int, layers: Sequence[CountedLayer], sparse: SparseSettings, zeros: Zeros
) -> list[str]:
    """The ``max_iter`` that a changed rule needs to reach its target; empty where it has the time."""
    iterations = _iterations_of(thresholds_needed(layers, sparse, zeros) or 0, sparse)
    return [f"{key}.solver.max_iter={iterations}"] if iterations > max_iter else []


def _iterations_of(thresholds: int, sparse: SparseSettings) -> int:
    """How many iterations it takes to apply so many thresholds."""
    return step_iterations(sparse, 2**62)[thresholds - 1] + 1 if thresholds else 0


def _highest_target(counted: Sequence[CountedLayer], sparse: SparseSettings, zeros: Zeros) -> float:
    """The highest target, in thousandths, that the schedule can reach. A lower one also ends it earlier."""
    for thousandths in range(int(sparse.target * 1000), 0, -1):
        changed = sparse.model_copy(update={"target": thousandths / 1000})
        if reach(counted, changed, None, zeros).sparsity >= changed.target:
            return changed.target
    return 0.0


def _larger_step(
    max_iter: int, counted: Sequence[CountedLayer], sparse: SparseSettings, zeros: Zeros
) -> float | None:
    """The smallest ``step_factor``, in thousandths, that reaches the target before ``max_iter``."""

    def reached(thousandths: int) -> float:
        changed = sparse.model_copy(update={"step_factor": thousandths / 1000})
        return reach(counted, changed, max_iter, zeros).sparsity

    choices = range(1, 1000)
    found = bisect_left(choices, sparse.target, key=reached)
    return choices[found] / 1000 if found < len(choices) else None


def _down(sparsity: float) -> str:
    """Three digits, never more than ``sparsity``."""
    return f"{math.floor(sparsity * 1000) / 1000:g}"
