"""What a Slurm job runs: the driver of its run, and at its early end a place in the queue again.

A run goes on where it stopped, so that a job may end at any time:

- Before the time limit, Slurm sends SIGUSR2: training stops with a snapshot, and the job is requeued here.
- At preemption, scancel and the loss of a node, Slurm sends SIGTERM, and requeues the job itself where it is
  to go on. Training stops with a snapshot where the ranks are still connected.
- If a rank is killed or loses the others, the job is requeued here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from caffe_jacinto.common.errors import RunFailed, WorkLost, run_command
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.common.processes import WARNINGS
from caffe_jacinto.runs import folder as run_folder
from caffe_jacinto.runs.process import StopSignals
from caffe_jacinto.runs.slurm import FOLDER, requeue, submit_command

LOCK_SECONDS = 300.0
"""How long to wait for a driver of the job's earlier start to end, on a node that Slurm has lost."""

MOST_LOSSES = 3
"""Losses of ranks, one after the other and without a new snapshot, after which the job fails."""

_LOSSES = "losses.json"


def train_in_job(folder: str) -> None:
    """Train the run in ``folder`` as the job that this process belongs to; ends the process."""
    signals = StopSignals()
    raise SystemExit(run_command("caffe_jacinto.train", lambda _: _train(Path(folder), signals)))


def _train(folder: Path, signals: StopSignals) -> int:
    from caffe_jacinto.runs.start import Options, resume

    before = _progress(folder)
    try:
        code = resume(folder, Options(), signals, lock_seconds=LOCK_SECONDS)
    except RunFailed as error:
        if signals.requested and signals.number not in WARNINGS:
            return signals.exit_code  # what it was doing was ended by the same signal
        if not isinstance(error, WorkLost):
            raise
        lost = 0 if _progress(folder) - before else _losses(folder)
        write_whole(folder / FOLDER / _LOSSES, json.dumps(lost + 1) + "\n")
        if lost + 1 >= MOST_LOSSES:
            raise
        return _requeue(folder, str(error))
    if code == 0 or signals.number not in WARNINGS:
        return code
    if not _progress(folder) - before:
        raise RunFailed(
            "the time limit came before this job had trained anything, so it is not requeued; submit it with "
            f"a longer one: {submit_command(folder)} --time TIME"
        )
    return _requeue(folder, "the time limit is near")


def _requeue(folder: Path, why: str) -> int:
    """Requeue this job; returns the exit code.

    Raises:
        RunFailed: Slurm refuses.
    """
    refused = requeue(int(os.environ["SLURM_JOB_ID"]))
    if refused is not None:
        raise RunFailed(
            f"{why}; Slurm does not requeue the job: {refused}; to go on: {submit_command(folder)}"
        )
    print(f"requeued: {why}", flush=True)
    return 0


def _progress(folder: Path) -> set[str]:
    """What is done of the run: its snapshots, and the stages that have finished."""
    stages = run_folder.load(folder).stages
    done = {name for name, state in stages.items() if state.state == "finished"}
    return done | {str(file) for name in stages for file in (folder / name).glob("*.solverstate*")}


def _losses(folder: Path) -> int:
    try:
        return int(json.loads((folder / FOLDER / _LOSSES).read_text()))
    except (OSError, ValueError, TypeError):
        return 0
