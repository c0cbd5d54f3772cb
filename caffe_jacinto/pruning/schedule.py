"""When pruning happens, and by how much: the schedule of thresholds.

At iterations ``i >= start_iter`` that ``step_iter`` divides, while the sparsity reached is below the target
and the factor is at most min(target + 0.15, 0.95), the factor grows, and a threshold zeroes that fraction of
the smallest weights.

Published, it grows by ``step_factor``: these are caffe-jacinto's ``sparsity_*`` solver fields. The published
log's first threshold, from a ``sparsity_start_factor`` of 0, says ``Finding and applying sparsity: 0.01``.
With this schedule, and with a method other than the published one, a step coarser than `COARSE` ends at the
target, and beyond it the factor grows by `FINE`: where a factor of 0.8 makes 0.799 of the weights zero, a
second step of 0.8 would zero all.

With ``schedule = "cubic"`` it grows from s_i = ``start_factor`` to s_f = ``target`` as
s_f + (s_i - s_f) (1 - k / n)^3 at threshold k of n (Zhu and Gupta 2017, "To prune, or not to prune",
arXiv:1710.01878, equation 1), where n is as many thresholds as the published schedule takes; from there on it
grows by ``step_factor``, too, to no more than that bound.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from caffe_jacinto.recipes.model import SparseSettings

_NEXT_TO = 1e-9
"""The sum of many steps of 0.01 must not end above the cap by its rounding alone."""

COARSE = 0.05
"""A larger ``step_factor`` is not taken across the target."""

FINE = 0.01
"""What the factor grows by beyond the target, in the place of a coarse step: the published size."""


def factor_cap(target: float) -> float:
    """The factor above which no further threshold is applied."""
    return min(target + 0.15, 0.95)


def step_iterations(sparse: SparseSettings, max_iter: int) -> range:
    """The iterations (counted from 0) below ``max_iter`` after whose update a threshold may be applied."""
    first = -(-sparse.start_iter // sparse.step_iter) * sparse.step_iter
    return range(first, max_iter, sparse.step_iter)


def is_step(sparse: SparseSettings, iteration: int) -> bool:
    """Whether a threshold may be applied after the update of ``iteration`` (counted from 0)."""
    return iteration in step_iterations(sparse, iteration + 1)


def next_factor(sparse: SparseSettings, factor: float, achieved: float) -> float | None:
    """The factor to apply now, in [0, 1], given the one applied before; None at the end of the schedule.

    With targets of single layers the schedule goes on until the factor is at the network's target, where
    these layers are at theirs, even if the sparsity ``achieved`` is there before.
    """
    on_the_way = bool(sparse.targets) and factor < sparse.target - _NEXT_TO
    if achieved >= sparse.target and not on_the_way:
        return None
    if sparse.schedule == "cubic":
        if factor < sparse.target:
            return _next_cubic(sparse, factor)
        most = factor_cap(sparse.target)
        return min(_grown(sparse, factor), most) if factor < most - _NEXT_TO else None
    if factor > factor_cap(sparse.target) + _NEXT_TO:
        return None
    return min(round(_grown(sparse, factor), 9), 1.0)


def _grown(sparse: SparseSettings, factor: float) -> float:
    """The factor after a step."""
    published = sparse.method == "magnitude" and sparse.schedule == "steps"
    if published or sparse.step_factor <= COARSE:
        return factor + sparse.step_factor
    if factor < sparse.target - _NEXT_TO:
        return min(factor + sparse.step_factor, sparse.target)
    return factor + FINE


def _next_cubic(sparse: SparseSettings, factor: float) -> float:
    """The first factor of the cubic schedule above ``factor``."""
    steps = math.ceil((sparse.target - sparse.start_factor) / sparse.step_factor - _NEXT_TO)

    def at(step: int) -> float:
        return sparse.target + (sparse.start_factor - sparse.target) * (1 - step / steps) ** 3

    return at(min(bisect_right(range(1, steps + 1), factor, key=at) + 1, steps))


def factors(sparse: SparseSettings) -> Iterator[float]:
    """The factors of all thresholds of the schedule, in order, where the target is never reached."""
    factor = next_factor(sparse, sparse.start_factor, 0.0)
    while factor is not None:
        yield factor
        factor = next_factor(sparse, factor, 0.0)
