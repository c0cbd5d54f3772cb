"""How far a run is, told from its files alone: for a look from another terminal, or after the fact."""

from __future__ import annotations

import time
from pathlib import Path

from caffe_jacinto.runs import folder as run_folder
from caffe_jacinto.runs.folder import LOG_NAME, TEST, RunRecord, StageState, report_command, resume_command
from caffe_jacinto.runs.lock import holders, is_held
from caffe_jacinto.runs.progress import Place, last_heard, outputs_line, progress, test_line
from caffe_jacinto.runs.watch import StageView


def status_lines(folder: Path) -> list[str]:
    """The state of the run in ``folder``: of the whole, then of each stage.

    Raises:
        UserError: there is no run.
    """
    record = run_folder.load(folder)
    held = is_held(folder)
    lines = [f"{folder}: {_whole(folder, record, held)}"]
    for name, state in record.stages.items():
        lines.append(f"  {_stage(folder, record, name, state, held)}")
        if state.message and state.state == "failed":
            lines.append(f"    {state.message}")
    if _finished(record):
        lines.append(f"tables: {report_command(folder)}")
    elif not held:
        lines.append(f"to go on: {resume_command(folder)}")
    return lines


def _whole(folder: Path, record: RunRecord, held: bool) -> str:
    if held:
        return f"running{_alone(folder)}"
    if _finished(record):
        return "finished"
    states = {state.state for state in record.stages.values()}
    if "failed" in states:
        return "failed"
    if states == {"waiting"}:
        return "not started"
    return "stopped"


def _alone(folder: Path) -> str:
    """What to say of a Caffe that no train watches."""
    found = holders(folder)
    if not found or any(holder.is_driver for holder in found):
        return ""
    return f" (process {found[0].pid}, without train, which was killed or never there)"


def _finished(record: RunRecord) -> bool:
    return all(state.state == "finished" for state in record.stages.values())


def _stage(folder: Path, record: RunRecord, name: str, state: StageState, held: bool) -> str:
    shown = "cut off" if state.state == "running" and not held else state.state
    if state.state == "waiting":
        return f"{name}: {shown}"
    log = folder / name / LOG_NAME
    view = StageView()
    view.feed_file(log)
    running = shown == "running"
    silent = _silent(log) if running else 0.0
    if name == TEST:
        return ", ".join([f"{name}: {shown}", *_test(view, silent)])
    place = Place(record.recipe, name)
    if state.state == "finished":
        outputs = view.tests.get(place.max_iter)
        return ", ".join([f"{name}: {shown}", *([test_line(outputs)] if outputs else []), *_sparsity(view)])
    said = progress(view, place, running=running, silent=silent).fields()[1:]
    return ", ".join([f"{name}: {shown}", *said])


def _test(view: StageView, silent: float) -> list[str]:
    if view.final_outputs:
        return [outputs_line(view.final_outputs)]
    batches = [f"batch {view.batches_done:,}/{view.batches:,}"] if view.batches else []
    return [*batches, *last_heard(silent)]


def _sparsity(view: StageView) -> list[str]:
    return [] if view.sparsity is None else [f"sparsity {view.sparsity:.3f}"]


def _silent(log: Path) -> float:
    """Seconds since the log has grown."""
    try:
        return max(time.time() - log.stat().st_mtime, 0.0)
    except OSError:
        return 0.0
