"""A run as a job of a Slurm cluster: submission, and what Slurm knows of the job.

submitit writes the job's script and submits it; what the job runs is in runs/slurm_job.py. The files of both
are in the run folder:

    slurm/
        job.json              the number of the run's newest job
        12_0_log.out          what train printed as job 12
        12_submission.sh      the script of job 12
        12_submitted.pkl      submitit's record of what to call
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import PACKAGE, write_whole
from caffe_jacinto.common.text import count_of
from caffe_jacinto.recipes.model import TrainingSettings
from caffe_jacinto.runs.folder import SlurmRecord, resume_command, status_command

FOLDER = "slurm"
"""In the run folder."""

_JOB = "job.json"

_WARNING = 120
"""Seconds before the time limit at which training is told to stop, or a quarter of a shorter limit."""

_ANSWER_SECONDS = 30
"""How long to wait for Slurm's answer."""

_OWN = {
    "nodes": "--nodes",
    "gpus-per-node": "--gpus-per-node",
    "time": "--time",
    "partition": "--partition",
    "ntasks": "--nodes and training.cpu_ranks",
    "ntasks-per-node": "--gpus-per-node or training.cpu_ranks",
    **dict.fromkeys(("array", "output", "error", "open-mode", "requeue", "no-requeue", "wrap", "chdir")),
}
"""The options of sbatch that are given in another way, and how (None: not at all)."""

_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
_ALIVE = (*_WAITING, "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING")
"""States of a job that waits or runs (squeue's manual, "JOB STATE CODES")."""


@dataclass(frozen=True)
class SlurmRequest:
    """What the command line asks of Slurm. None leaves it to the recipe, or to the run that is resumed."""

    nodes: int | None = None
    time: int | None = None
    """Minutes."""

    partition: str | None = None
    options: tuple[tuple[str, str | None], ...] = ()
    """More options of sbatch, with their values; None: a flag."""

    def record(self, before: SlurmRecord | None = None) -> SlurmRecord:
        """What is kept in run.json: this, over what was kept ``before``."""
        before = before or SlurmRecord()
        return SlurmRecord(
            time=self.time or before.time,
            partition=self.partition or before.partition,
            options={**before.options, **dict(self.options)},
        )


@dataclass(frozen=True)
class Job:
    """A job as Slurm shows it."""

    number: int
    facts: dict[str, str]
    """Of ``scontrol show job``; empty if Slurm does not know the job any more, or gives no answer."""

    trouble: str | None = None
    """Why there are no facts."""

    @property
    def state(self) -> str:
        return self.facts.get("JobState", "")

    @property
    def alive(self) -> bool:
        """Whether it waits or runs."""
        return self.state in _ALIVE

    @property
    def running(self) -> bool:
        return self.state == "RUNNING"

    @property
    def restarts(self) -> int:
        return int(self.facts.get("Restarts", "0"))

    def line(self) -> str:
        """``Slurm job 12: RUNNING on n[1-2] for 00:03:10 of 01:00:00, requeued 1 time``."""
        return f"Slurm job {self.number}: {self.trouble or self._described()}"

    def _described(self) -> str:
        facts = self.facts
        if self.running:
            shown = f"RUNNING on {facts.get('NodeList')} for {facts.get('RunTime')}"
            limit = facts.get("TimeLimit", "UNLIMITED")
            shown += "" if limit == "UNLIMITED" else f" of {limit}"
        else:
            reason = facts.get("Reason", "None")
            shown = self.state + (f" ({reason})" if reason != "None" else "")
        if self.restarts:
            shown += f", requeued {count_of(self.restarts, 'time')}"
        return shown


def slurm_minutes(text: str) -> int:
    """An argument type: a time limit as Slurm writes it, in minutes, rounded up.

    The forms are M, M:S, H:M:S, D-H, D-H:M and D-H:M:S (sbatch's manual, ``--time``).
    """
    form = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,6})(?::(\d{1,2}))?(?::(\d{1,2}))?", text, re.ASCII)
    seconds = 0
    if form:
        days, *parts = form.groups()
        numbers = [int(part) for part in parts if part is not None]
        if days is not None:
            hours, minutes, rest = (*numbers, 0, 0)[:3]
            seconds = ((int(days) * 24 + hours) * 60 + minutes) * 60 + rest
        else:
            hours, minutes, rest = numbers if len(numbers) == 3 else (0, *numbers, 0)[:3]
            seconds = (hours * 60 + minutes) * 60 + rest
    if not seconds:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a time limit like 90 (minutes), 12:00:00 or 2-12 (days-hours)"
        )
    return -(-seconds // 60)


def sbatch_option(text: str) -> tuple[str, str | None]:
    """An argument type: ``KEY=VALUE`` or ``KEY``, a long option of sbatch."""
    key, equals, value = text.partition("=")
    key = key.removeprefix("--").replace("_", "-")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", key) or (equals and not value):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not KEY=VALUE, a long option of sbatch")
    if not value.isprintable():
        raise argparse.ArgumentTypeError(f"{key}: its value has characters that cannot be printed")
    if key in _OWN:
        how = _OWN[key]
        raise argparse.ArgumentTypeError(f"{key}: give {how}" if how else f"{key}: train sets that itself")
    if key == "signal" and not re.fullmatch(r"B:(SIG)?USR[12]@\d{1,5}", value):
        raise argparse.ArgumentTypeError(
            f"signal: training stops for B:USR2@SECONDS before the time limit, not for {value[:40]!r}"
        )
    return key, value if equals else None


def check_slurm() -> None:
    """Refuse to go on where a job cannot be submitted.

    Raises:
        UserError: there is no Slurm, or no submitit.
    """
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError(
            "--slurm: this machine has no Slurm (no sbatch or srun on the PATH): submit from a login node "
            "of the cluster"
        )
    if util.find_spec("submitit") is None:
        raise UserError(
            f"--slurm: {sys.executable} has no submitit; install it: "
            f"{sys.executable} -m pip install 'caffe-jacinto[slurm]'"
        )


def submit(folder: Path, training: TrainingSettings, record: SlurmRecord) -> list[str]:
    """Submit the run in ``folder``; returns what to tell the user: the job's number, how to follow it.

    Raises:
        UserError: Slurm refuses the job.
    """
    import submitit

    from caffe_jacinto.runs.slurm_job import train_in_job

    folder = folder.absolute()
    ranks = len(training.gpus) or training.cpu_ranks
    warning = _WARNING if record.time is None else min(_WARNING, 60 * record.time // 4)
    # Without exec, the time limit's signal would reach the shell alone.
    executor = submitit.SlurmExecutor(folder / FOLDER, python=f"exec {shlex.quote(sys.executable)}")
    executor.update_parameters(
        job_name=re.sub(r"[^\w.-]", "_", folder.name, flags=re.ASCII),
        nodes=training.nodes,
        ntasks_per_node=ranks,
        gpus_per_node=len(training.gpus) or None,
        time=record.time,
        partition=record.partition,
        setup=[f"export PYTHONPATH={shlex.quote(str(PACKAGE.parent))}${{PYTHONPATH:+:$PYTHONPATH}}"],
        wckey=None,
        stderr_to_stdout=True,
        use_srun=False,
        additional_parameters={
            "signal": f"B:USR2@{warning}",
            "requeue": True,
            **{key: True if value is None else value for key, value in record.options.items()},
        },
    )
    try:
        with redirect_stderr(io.StringIO()):  # where submitit repeats what sbatch says
            job = executor.submit(train_in_job, str(folder))
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f"Slurm refuses the job: {_reason(str(error))}") from None
    write_whole(folder / FOLDER / _JOB, json.dumps({"job": int(job.job_id)}) + "\n")
    size = f"{count_of(training.nodes, 'node')}, {count_of(ranks, 'rank')} each"
    return [
        f"Slurm job {job.job_id}: {size}",
        f"  how far it is: {status_command(folder)}",
        f"  its output:    {shlex.join(['tail', '-F', str(job.paths.stdout)])}",
        f"  to cancel it:  {cancel_command(int(job.job_id))}",
    ]


def job_of(folder: Path) -> Job | None:
    """The newest job of the run in ``folder``, as Slurm knows it now; None if it never had one."""
    try:
        number = int(json.loads((folder / FOLDER / _JOB).read_text())["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _ask(number)


def check_no_other_job(folder: Path) -> None:
    """Refuse where another job than this process's own is to train the run.

    Raises:
        UserError: one waits or runs.
    """
    job = job_of(folder)
    if job is not None and job.alive and os.environ.get("SLURM_JOB_ID") != str(job.number):
        raise UserError(
            f"{folder}: {job.line()}: it trains this run; to train it otherwise, cancel it first: "
            f"{cancel_command(job.number)}"
        )


def cancel_command(job: int) -> str:
    return f"scancel {job}"


def submit_command(folder: Path) -> str:
    return f"{resume_command(folder)} --slurm"


def requeue(job: int) -> str | None:
    """Put the job that this process belongs to back into the queue; returns why Slurm does not, or None."""
    done = _run("scontrol", "requeue", str(job))
    if isinstance(done, str):
        return done
    if done.returncode == 0 or _ask(job).state in _WAITING:
        return None
    return _reason(done.stderr)


def _ask(number: int) -> Job:
    shown = _run("scontrol", "--oneliner", "show", "job", str(number))
    if isinstance(shown, str):
        return Job(number, {}, shown)
    if shown.returncode == 0:
        # Values may hold blanks, but names do not, and those needed here come with plain values.
        return Job(number, dict(re.findall(r"(?:^|\s)([\w/:]+)=(\S*)", shown.stdout)))
    if "Invalid job id" in shown.stderr:
        # The controller forgets a job minutes after its end; the accounting, where there is one, does not.
        kept = _run("sacct", "-X", "-n", "-P", "-o", "State", "-j", str(number))
        states = [] if isinstance(kept, str) else kept.stdout.split("\n")
        if states and states[0].strip():
            return Job(number, {"JobState": states[0].split()[0]})
        return Job(number, {}, "it has ended, and Slurm has forgotten it")
    return Job(number, {}, f"Slurm gives no answer: {_reason(shown.stderr)}")


def _run(*command: str) -> subprocess.CompletedProcess[str] | str:
    """What one of Slurm's commands printed; or why it did not run, in words."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"Slurm gives no answer within {_ANSWER_SECONDS} s"
    except OSError as error:
        return f"{command[0]} cannot be started here: {error.strerror}"


def _reason(said: str) -> str:
    """What Slurm's command said, in one line."""
    lines = [re.sub(r"^s\w+: (error: )?", "", line).strip() for line in said.splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith("Try ")) or "it gives no reason"
