"""Why a stage failed, in Caffe's own words where it has any, and what to do about it."""

from __future__ import annotations

import shutil
from pathlib import Path

from caffe_jacinto.runs.folder import LOG_HEADER, resume_command
from caffe_jacinto.runs.plan import RunPlan, StagePlan
from caffe_jacinto.runs.process import describe_exit
from caffe_jacinto.runs.start_point import start_point
from caffe_jacinto.runs.watch import StageView

FULL_DISK = 1 << 20
"""With fewer bytes free, the disk is why."""

WORDS = 300
"""Characters shown of a log's last line."""


def why_failed(run: RunPlan, plan: StagePlan, view: StageView, code: int) -> str:
    """The reason in a line. ``code`` is the exit code of the stage's last command."""
    reason = _reason(run, plan, view, code)
    full = shutil.disk_usage(run.folder).free < FULL_DISK
    return f"{reason}; the disk is full" if full else reason


def _reason(run: RunPlan, plan: StagePlan, view: StageView, code: int) -> str:
    go_on = f"to go on: {resume_command(run.folder)}"
    if view.trouble is not None:
        return _trouble(run, plan, view.trouble, view.sound)
    if view.fatal is not None:
        return view.fatal + _if_out_of_memory(plan, view.fatal)
    if code != 0:
        return f"{describe_exit(code)}{last_words(plan.log)}; {go_on}"
    if view.iteration < plan.stage.solver.max_iter:
        where = f"at iteration {view.iteration:,}"
        return f"Caffe ended early, {where}, as it does when it is interrupted; {go_on}"
    not_good = start_point(plan, run.engine.info.dialect).passed_over
    if not_good:
        return f"its last snapshot is not good: {not_good[0]}; {go_on}"
    return f"it ended before its weights were handed over, as it does when it is interrupted; {go_on}"


def _trouble(run: RunPlan, plan: StagePlan, trouble: str, sound: int) -> str:
    good = start_point(plan, run.engine.info.dialect, until=sound).snapshot
    rate = plan.stage.solver.base_lr
    named = f"the last good snapshot is {good.caffemodel}" if good else "no snapshot before it is good"
    return (
        f"{trouble}, so it was stopped; {named}; a new run with a lower learning rate, such as "
        f"--set stages.{plan.name}.solver.base_lr={rate / 10:g} (now {rate:g}), may hold"
    )


def _if_out_of_memory(plan: StagePlan, fatal: str) -> str:
    """What to do about a GPU that does not hold the batch."""
    if "out of memory" not in fatal.lower():
        return ""
    passes = plan.devices.iter_size
    return (
        f"; a new run with more passes, such as --iter-size {2 * passes} (now {passes}), or a smaller "
        "training.val_batch_size needs less memory"
    )


def last_words(log: Path) -> str:
    """The last line of a command that died without a fatal line of Caffe's, glog's list of calls aside."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16384))
        lines = file.read().decode(errors="replace").splitlines()
    for line in map(str.strip, reversed(lines)):
        if line.startswith(LOG_HEADER):
            return ""
        if line and not line.startswith(("@ ", "*** ")):
            return f", its last line: {line[:WORDS]}"
    return ""
