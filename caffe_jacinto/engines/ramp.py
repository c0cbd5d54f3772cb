"""The ramp of the fraction to zero: when a threshold is due, and how far the ramp has come.

Rule of the published method (caffe-jacinto's ``sparsity_*`` solver fields): at iterations ``i >= start_iter``
that ``step_iter`` divides, while the achieved sparsity is under the target and the factor is at most
min(target + 0.15, 0.95), the factor grows by ``step_factor`` and is then applied; the published log's first
threshold, from a ``sparsity_start_factor`` of 0, says ``Finding and applying sparsity: 0.01``.
"""

from __future__ import annotations

import re

from caffe_jacinto.recipes.model import SparseSettings


def factor_cap(target: float) -> float:
    """The factor above which no further threshold is taken."""
    return min(target + 0.15, 0.95)


def is_step(sparse: SparseSettings, iteration: int) -> bool:
    """Whether a threshold may be taken after the update of ``iteration`` (counted from 0)."""
    return iteration >= sparse.start_iter and iteration % sparse.step_iter == 0


def next_factor(sparse: SparseSettings, factor: float, achieved: float) -> float | None:
    """The factor to apply now, in [0, 1], given the one applied before; None when the ramp is at its end."""
    # The sum of many steps of 0.01 must not end above the cap by its rounding alone.
    if achieved >= sparse.target or factor > factor_cap(sparse.target) + 1e-9:
        return None
    return min(round(factor + sparse.step_factor, 9), 1.0)


def fork_start_factor(sparse: SparseSettings, iteration: int, log: str) -> float:
    """The factor that the fork's ramp had reached in its snapshot of ``iteration``, which does not hold it.

    Taken from the stage's ``log`` (of several runs, one after the other), up to the line that tells of this
    snapshot. A log that does not tell of it leaves the count of steps: right as long as the target was not
    reached, and when it was, the factor no longer matters, since zeros stay and no threshold follows.
    """
    factor = sparse.start_factor
    reached = None
    event = re.compile(
        r"^sparsity_start_factor: (?P<start>\S+)"
        r"|\] Initializing solver from (?P<fresh>parameters)"
        r"|\] Finding and applying sparsity: (?P<applied>\S+)"
        rf"|\] Snapshotting to binary proto file .*_iter_(?P<snapshot>{iteration})\.caffemodel",
        re.MULTILINE,
    )
    for found in event.finditer(log):
        if found["fresh"]:
            factor = 0.0  # the schema's default, where the solver's text has no other
        elif found["snapshot"]:
            reached = factor
        else:
            factor = float(found["start"] or found["applied"])
    if reached is not None:
        return reached
    factor = sparse.start_factor
    for step in range(iteration):
        if is_step(sparse, step):
            factor = next_factor(sparse, factor, 0.0) or factor
    return factor
