"""How much disk space a run's snapshots take, and what to say when the disk is full."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from caffe_jacinto.common.disk import NEARLY_FULL, existing, free_bytes, place_of, says_full, size
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.prototxt.solver import histories
from caffe_jacinto.runs.folder import resume_command
from caffe_jacinto.runs.plan import RunPlan, StagePlan
from caffe_jacinto.runs.retention import snapshot_files

BYTES_PER_WEIGHT = 4
MARGIN = 1.1
"""For logs, masks and the file system's own needs."""


def check_space(run: RunPlan, stages: Sequence[StagePlan], keep: int, *, resuming: bool) -> None:
    """Refuse to start ``stages`` on a disk that will not hold their snapshots.

    Raises:
        UserError: it will not, or the run folder cannot be written.
    """
    needed, free = bytes_needed(run, stages, keep), free_bytes(run.folder)
    if free < needed:
        elsewhere = "" if resuming else ", or put the run elsewhere with --output"
        raise UserError(
            f"not enough space on {place_of(run.folder)}: the snapshots need about "
            f"{size(needed)} more (training.keep is {keep}), and {size(free)} are free; free "
            f"{size(needed - free)}{elsewhere}"
        )
    if not os.access(existing(run.folder), os.W_OK):
        raise UserError(f"{existing(run.folder)} is not writable; choose another folder with --output")


def full_disk(
    run: RunPlan, stages: Sequence[StagePlan], keep: int, reason: str, *, cut_off: bool = False
) -> str | None:
    """What to say if a full disk is why ``reason`` was given; None if there is another.

    ``stages`` are those still to be trained. ``cut_off``: a file could be made, and not all of it written.
    """
    free = free_bytes(run.folder)
    if not cut_off and not says_full(reason) and free >= NEARLY_FULL:
        return None
    needed = max(bytes_needed(run, stages, keep), NEARLY_FULL)
    if free < needed:
        found = f"is full: {size(free)} are free, and the run needs about {size(needed)} more"
        mend = f"free {size(needed - free)}, then resume"
    else:
        found = f"was full, or your quota on it used up: {size(free)} are free now"
        mend = "see that it stays so, then resume"
    return f"{place_of(run.folder)} {found} ({reason}); {mend}: {resume_command(run.folder)}"


def bytes_needed(run: RunPlan, stages: Sequence[StagePlan], keep: int) -> int:
    """What the snapshots of ``stages`` will take beside what is there already, at most."""
    snapshots = sum(_snapshots_at_once(plan, keep) * _snapshot_bytes(run, plan) for plan in stages)
    starts = sum(BYTES_PER_WEIGHT * _weight_count(run, plan) for plan in stages if plan.copies_weights)
    return max(int((snapshots + starts) * MARGIN) - sum(_bytes_there(plan.prefix) for plan in stages), 0)


def _weight_count(run: RunPlan, plan: StagePlan) -> int:
    """Numbers in a weight file of the network."""
    from caffe_jacinto.engines.contract import data_shapes
    from caffe_jacinto.netspec.data_fit import image_shapes
    from caffe_jacinto.netspec.graph import TRAIN
    from caffe_jacinto.netspec.shapes import blob_shapes
    from caffe_jacinto.prototxt.schema import parse_net

    net = parse_net(run.files(plan)["train.prototxt"], run.engine.info.dialect, "train.prototxt")
    shapes = data_shapes(net, image_shapes(run.data_sizes), TRAIN)
    blobs = blob_shapes(net, TRAIN, shapes)
    return sum(math.prod(dim or 1 for dim in shape) for shapes in blobs.values() for shape in shapes)


def _snapshots_at_once(plan: StagePlan, keep: int) -> int:
    """The newest ones, the best, the last, and the one being written."""
    solver = plan.solver
    return min(keep + 3, -(-solver.max_iter // solver.snapshot) + 1)


def _snapshot_bytes(run: RunPlan, plan: StagePlan) -> int:
    """Weights, their average and the solver state: one value per weight, and its history's."""
    average = plan.solver.ema_decay is not None
    return BYTES_PER_WEIGHT * _weight_count(run, plan) * (1 + average + histories(plan.solver.type))


def _bytes_there(prefix: Path) -> int:
    """Bytes that an earlier attempt's snapshots already take."""
    files = snapshot_files(prefix).values() if prefix.parent.is_dir() else []
    return sum(file.stat().st_size for group in files for file in group)
