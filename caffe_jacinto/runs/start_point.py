"""Where a stage begins: at its newest snapshot that can be trusted, or at its start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.snapshots import Snapshot, survey
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.runs.plan import StagePlan


@dataclass(frozen=True)
class StartPoint:
    """The snapshot a stage goes on from (None: from its start), and why newer ones are passed over."""

    snapshot: Snapshot | None
    passed_over: tuple[str, ...]

    @property
    def iteration(self) -> int:
        return 0 if self.snapshot is None else self.snapshot.iteration


def start_point(plan: StagePlan, dialect: Dialect, until: int | None = None) -> StartPoint:
    """The newest complete snapshot of the stage whose weights are numbers, up to iteration ``until``."""
    last = plan.stage.solver.max_iter if until is None else until
    found = survey(plan.prefix, dialect)
    passed_over = list(found.skipped)
    for snapshot in found.complete:
        reason = _unfit(snapshot, last)
        if reason is None:
            newer = tuple(line for line in passed_over if _names_newer(line, snapshot.iteration))
            return StartPoint(snapshot, newer)
        passed_over.append(f"snapshot of iteration {snapshot.iteration} is passed over: {reason}")
    return StartPoint(None, tuple(passed_over))


def _unfit(snapshot: Snapshot, last: int) -> str | None:
    if snapshot.iteration > last:
        return f"it is beyond iteration {last}"
    if not weights_are_finite(snapshot.caffemodel):
        return f"{snapshot.caffemodel} holds weights that are not numbers"
    return None


def weights_are_finite(caffemodel: Path) -> bool:
    """False when a weight is infinite or not a number, or the file cannot be read."""
    import numpy as np

    from caffe_jacinto.caffemodel.storage import read_weights

    try:
        weights = read_weights(caffemodel)
    except UserError:
        return False
    return all(bool(np.isfinite(blob).all()) for blobs in weights.values() for blob in blobs)


def _names_newer(line: str, iteration: int) -> bool:
    """Whether a line of the survey is of a snapshot newer than ``iteration``; older ones do not matter."""
    words = line.split()
    number = next((word for word in words if word.isdigit()), None)
    return number is None or int(number) > iteration
