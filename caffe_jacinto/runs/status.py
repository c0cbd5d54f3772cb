"""How far a run is, told from its files alone: for a look from another terminal, or after the fact."""

from __future__ import annotations

from pathlib import Path

from caffe_jacinto.runs import folder as run_folder
from caffe_jacinto.runs.driver import resume_command
from caffe_jacinto.runs.folder import LOG_NAME, TEST, RunRecord, StageState
from caffe_jacinto.runs.lock import holders, is_held
from caffe_jacinto.runs.progress import Place, progress_fields, test_line
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
        if state.message and state.state in ("failed", "stopped"):
            lines.append(f"    {state.message}")
    if not held and not _finished(record):
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
    view = StageView()
    view.feed_file(folder / name / LOG_NAME)
    if name == TEST:
        results = f", {test_line(view.final_outputs)}" if view.final_outputs else ""
        return f"{name}: {shown}{results}"
    place = Place(record.recipe, name)
    if state.state == "finished":
        outputs = view.tests.get(place.max_iter)
        return f"{name}: {shown}{f', {test_line(outputs)}' if outputs else ''}"
    return f"{name}: {shown}, {', '.join(progress_fields(view, place, running=shown == 'running')[1:])}"
