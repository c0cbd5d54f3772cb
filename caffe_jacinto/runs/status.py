"""How far a run is, read from its files alone: from another terminal, or after it has ended."""

from __future__ import annotations

import time
from pathlib import Path

from caffe_jacinto.logs.discover import STAGE_LOG
from caffe_jacinto.logs.stage import StageLog
from caffe_jacinto.runs import folder as run_folder
from caffe_jacinto.runs.folder import TEST, RunRecord, StageState, report_command, resume_command
from caffe_jacinto.runs.lock import holders, is_held
from caffe_jacinto.runs.progress import (
    Place,
    last_heard,
    outputs_line,
    progress,
    sparsity_field,
    test_progress,
)
from caffe_jacinto.runs.slurm import cancel_command, job_of
from caffe_jacinto.runs.watch import read_log


def status_lines(folder: Path) -> list[str]:
    """The state of the run in ``folder``, then of each stage.

    Raises:
        UserError: there is no run, or its record is damaged.
    """
    folder = run_folder.run_folder_of(folder)
    record = run_folder.load(folder)
    job = job_of(folder)
    # Not every file system shows the lock of another machine.
    held = is_held(folder) or (job is not None and job.running)
    lines = [f"{folder}: {_whole(folder, record, held)}"]
    if job is not None:
        cancel = f"; to cancel it: {cancel_command(job.number)}" if job.alive else ""
        lines.append(f"  {job.line()}{cancel}")
    for name, state in record.stages.items():
        log = read_log(folder / name)
        lines.append(f"  {_stage(folder, record, name, state, held, log)}")
        lines += [f"    {words}" for words in log.losses.found.values() if state.state == "running"]
        if state.message and state.state == "failed":
            lines.append(f"    {state.message}")
    if record.has_finished:
        lines.append(f"tables: {report_command(folder)}")
    elif not held and (job is None or not job.alive):
        lines.append(f"to resume: {resume_command(folder, record)}")
    return lines


def _whole(folder: Path, record: RunRecord, held: bool) -> str:
    if held:
        return f"running{_alone(folder)}"
    if record.has_finished:
        return "finished"
    states = {state.state for state in record.stages.values()}
    if "failed" in states:
        return "failed"
    if states == {"waiting"}:
        return "not started"
    return "stopped"


def _alone(folder: Path) -> str:
    """A remark on a Caffe that no train watches."""
    found = holders(folder)
    if not found or any(holder.is_driver for holder in found):
        return ""
    return f" (process {found[0].pid}, without train, which was killed or never started)"


def _stage(folder: Path, record: RunRecord, name: str, state: StageState, held: bool, log: StageLog) -> str:
    shown = "cut off" if state.state == "running" and not held else state.state
    if state.state == "waiting":
        return f"{name}: {shown}"
    running = shown == "running"
    silent = _silent(folder / name / STAGE_LOG) if running else 0.0
    if name == TEST or record.recipe.stages[name].solver is None:
        return ", ".join([f"{name}: {shown}", *_test(log, silent)])
    place = Place(record.recipe, name)
    if state.state == "finished":
        test = log.tests.get(place.max_iter)
        outputs = [f"test: {outputs_line(log, test.outputs)}"] if test else []
        return ", ".join([f"{name}: {shown}", *outputs, *sparsity_field(log)])
    fields = progress(log, place, running=running, silent=silent).fields()[1:]
    return ", ".join([f"{name}: {shown}", *fields])


def _test(log: StageLog, silent: float) -> list[str]:
    results = log.results()
    if results:
        return [outputs_line(log, results)]
    _, total, words = test_progress(log)
    return [*([words] if total else []), *last_heard(silent)]


def _silent(log: Path) -> float:
    """Seconds since the log last grew."""
    try:
        return max(time.time() - log.stat().st_mtime, 0.0)
    except OSError:
        return 0.0
