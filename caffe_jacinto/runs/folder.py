"""A run folder: its layout, and run.json, the record of its recipe and the state of each stage.

training/<dataset>_<network>_<time>/
    run.json    the recipe in full, the engine, the state of each stage
    lock        held while something trains here
    slurm/      the files of its Slurm jobs, if it was submitted (runs/slurm.py)
    labels.txt  the class names, if the data set has them
    network.prototxt  a copy of the user's own network, if the recipe names one; network_2.prototxt and so on
    report.html its tables and curves, for a browser (runs/page.py)
    initial/  l1reg/  sparse/  finetune/  test/
        train.prototxt val.prototxt deploy.prototxt solver.prototxt
        run.sh    the commands, runnable by hand
        run.log   what Caffe printed
        <dataset>_<network>_iter_N.caffemodel / .solverstate
    quantize/   what caffe_jacinto.quantize writes, run.sh, run.log
"""

from __future__ import annotations

import os
import re
import shlex
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import is_unfinished, remove_unfinished, write_whole
from caffe_jacinto.data.identity import LmdbIdentity
from caffe_jacinto.engines.contract import EngineKind, Precision
from caffe_jacinto.logs.discover import RUN_RECORD
from caffe_jacinto.logs.lines import LOG_HEADER
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.recipes.model import Recipe
from caffe_jacinto.runs.lock import LOCK_NAME

NETWORK_COPY = "network"
"""Begins the names of the copies of a user's own network (runs/user_files.py)."""

TEST = "test"
"""The folder of the last step, the test of the final weights."""

State = Literal["waiting", "running", "finished", "failed", "stopped"]


DataName = Literal["train_lmdb", "val_lmdb"]
"""The recipe's keys of the LMDBs."""


class StageState(BaseModel):
    """The state of a stage. One that is *running* while nothing holds the lock was cut off."""

    model_config = ConfigDict(extra="ignore")

    state: State = "waiting"
    started: str | None = None
    """The last start: ISO 8601, with the time zone."""

    ended: str | None = None
    pid: int | None = None
    """The process of its last command."""

    message: str | None = None
    """Why it failed or stopped."""


class EngineRecord(BaseModel):
    """The engine of the run."""

    model_config = ConfigDict(extra="ignore")

    kind: EngineKind
    executable: str
    version: str | None
    dialect: Dialect
    precision: Precision = "fp32"


class SlurmRecord(BaseModel):
    """How the run is submitted to Slurm; the nodes and GPUs are the recipe's."""

    model_config = ConfigDict(extra="ignore")

    time: int | None = None
    """The time limit of a job, in minutes; None: the partition's."""

    partition: str | None = None
    options: dict[str, str | None] = {}
    """More options of sbatch; None: a flag."""


class RunRecord(BaseModel):
    """The contents of run.json."""

    model_config = ConfigDict(extra="ignore")

    format: Literal[1] = 1
    caffe_jacinto: str
    """The version of this program that made the run."""

    created: str
    start_folder: str
    """Where train was started. Relative paths in the recipe and in the run's files resolve against it."""

    folder: str
    """The run folder, as the run's files name it."""

    recipe: Recipe
    engine: EngineRecord
    gpus: tuple[int, ...]
    data: dict[DataName, LmdbIdentity] = {}
    """What the LMDBs held when the run was last started; empty in records of earlier versions."""

    slurm: SlurmRecord | None = None
    """None: it was not submitted to Slurm."""

    stages: dict[str, StageState]
    """Those of `steps_of`, in their order."""

    @property
    def has_finished(self) -> bool:
        return all(state.state == "finished" for state in self.stages.values())


def steps_of(recipe: Recipe) -> list[str]:
    """The stages that train, the test of the final weights, and the stages that quantize."""
    trained = recipe.trained
    return [*trained, TEST, *(name for name in recipe.stages if name not in trained)]


def default_folder(prefix: str) -> Path:
    """A new ``training/<prefix>_<time>``; the prefix is that of the weight files, ``<dataset>_<network>``."""
    name = f"{prefix}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    folder = Path("training") / name
    number = 2
    while folder.exists():
        folder = Path("training") / f"{name}_{number}"
        number += 1
    return folder


def now() -> str:
    """The time, in the form of run.json."""
    return datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")


def go_to_start_folder(folder: Path, start_folder: str, created_as: str) -> None:
    """Change to where the run or sweep in ``folder`` was started: relative paths resolve against it.

    Raises:
        UserError: ``start_folder`` is gone, or what was created as ``created_as`` has been moved.
    """
    try:
        os.chdir(start_folder)
    except OSError as error:
        raise UserError(
            f"cannot change to {start_folder}, where {folder} was started and its relative paths begin: "
            f"{error.strerror}"
        ) from None
    if Path(created_as).resolve() != folder.resolve():
        raise UserError(
            f"{folder} was created as {Path(created_as).absolute()}, a path that its files contain: "
            "move it back, or put a link there"
        )


def save(folder: Path, record: RunRecord) -> None:
    """Write run.json. A reader sees either the old record or the complete new one."""
    write_whole(folder / RUN_RECORD, record.model_dump_json(indent=2) + "\n")


def run_folder_of(path: Path) -> Path:
    """The folder of the run that a user names: that folder, or the run.json in it."""
    return path.parent if path.name == RUN_RECORD and path.is_file() else path


def load(folder: Path) -> RunRecord:
    """The record of the run in ``folder``.

    Raises:
        UserError: there is no such folder, it does not hold a run, or its record is damaged.
    """
    path = folder / RUN_RECORD
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        what = f"holds no run (no {RUN_RECORD})" if folder.is_dir() else "no such run folder"
        raise UserError(f"{folder}: {what}; give the folder that train printed when it started") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        record = RunRecord.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path}: {field}: {first['msg']}; the record is damaged or of another version: start a new run"
        ) from None
    wanted = steps_of(record.recipe)
    missing = [name for name in wanted if name not in record.stages]
    unknown = [name for name in record.stages if name not in wanted]
    if missing or unknown:
        what = (
            f"lacks {', '.join(missing)}" if missing else f"{unknown[0]} is not a stage of the run's recipe"
        )
        raise UserError(
            f"{path}: stages: {what}; it must have {', '.join(wanted)}: correct it, or start a new run"
        )
    return record


_COPY = re.compile(rf"{NETWORK_COPY}(_([2-9]|[1-9][0-9]+))?\.prototxt")
"""A copy of a network of the user's own (`user_files.copied`)."""


def is_free(folder: Path) -> bool:
    """Whether a new run can be made at ``folder``: it does not exist, or is empty.

    A folder with only a lock file, a copied network or an unfinished record is left by a train that was
    killed as it began.
    """
    return not folder.exists() or (
        folder.is_dir()
        and all(
            path.name == LOCK_NAME
            or is_unfinished(path.name)
            or (_COPY.fullmatch(path.name) and path.is_file())
            for path in folder.iterdir()
        )
    )


def tidy(folder: Path) -> None:
    """Remove what killed processes have left of files that they were writing in the run."""
    for inside in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        remove_unfinished(inside)


def never_ran(folder: Path) -> bool:
    """Whether ``folder`` is a run that has not started anything yet, as after a dry run."""
    try:
        record = load(folder)
    except UserError:
        return False
    return all(state.started is None for state in record.stages.values())


def start_log(path: Path, header: str) -> int:
    """Begin a new part of the log at ``path`` with the line ``header``; returns the part's offset in bytes.

    The part begins on a new line, even where the log was cut in the middle of one.
    """
    with path.open("ab+") as log:
        size = log.seek(0, 2)
        if size:
            log.seek(size - 1)
            if log.read(1) != b"\n":
                log.write(b"\n")
        log.write(f"{LOG_HEADER} {header}\n".encode())
        return log.seek(0, 2)


def resume_command(folder: Path, record: RunRecord | None = None) -> str:
    """How to resume the run; with its ``record``: as a Slurm job, if it was one."""
    slurm = ["--slurm"] if record is not None and record.slurm is not None else []
    return shlex.join(["python", "-m", "caffe_jacinto.train", "--resume", str(folder), *slurm])


def status_command(folder: Path) -> str:
    return shlex.join(["python", "-m", "caffe_jacinto.train", "--status", str(folder)])


def report_command(folder: Path) -> str:
    return shlex.join(["python", "-m", "caffe_jacinto.report", str(folder)])
