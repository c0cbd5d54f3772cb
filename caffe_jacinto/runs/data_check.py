"""Whether a run's LMDBs and lists are still those that it was started with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from caffe_jacinto.common.errors import UserError, UserErrors
from caffe_jacinto.data.identity import LmdbIdentity, data_identity
from caffe_jacinto.runs.folder import DataName, resume_command
from caffe_jacinto.runs.plan import RunPlan

ACCEPT = "--accept-data"


def data_of(run: RunPlan) -> dict[DataName, LmdbIdentity]:
    """What the LMDBs and lists of the run hold now.

    Raises:
        UserError: one cannot be read.
    """
    data = run.recipe.data
    return {
        "train_lmdb": data_identity(Path(data.train_lmdb)),
        "val_lmdb": data_identity(Path(data.val_lmdb)),
    }


def check_data(run: RunPlan, before: Mapping[DataName, LmdbIdentity]) -> None:
    """Refuse to go on with data that hold something else than ``before``; what that lacks is not compared.

    Raises:
        UserError: one has been replaced, or cannot be read.
    """
    problems = []
    for name, now in data_of(run).items():
        path = getattr(run.recipe.data, name)
        difference = before[name].difference(now) if name in before else None
        if difference is not None:
            problems.append(
                f"{_kind(path)} {path} (data.{name}) is not the one that the run was "
                f"started with: {difference}; put that one back and resume, or go on with this one by "
                f"{ACCEPT}: {resume_command(run.folder)} {ACCEPT}"
            )
    if problems:
        raise UserErrors(problems) if len(problems) > 1 else UserError(problems[0])


def _kind(path: str) -> str:
    return "the list" if Path(path).is_file() else "LMDB"
