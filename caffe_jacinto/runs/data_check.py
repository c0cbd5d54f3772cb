"""Whether the LMDBs and lists of a run or a sweep are still those that it was started with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from caffe_jacinto.common.errors import UserError, UserErrors
from caffe_jacinto.data.identity import LmdbIdentity, data_identity
from caffe_jacinto.recipes.model import DataSettings
from caffe_jacinto.runs.folder import DataName, resume_command
from caffe_jacinto.runs.plan import RunPlan

ACCEPT = "--accept-data"


def data_of(data: DataSettings) -> dict[DataName, LmdbIdentity]:
    """What the LMDBs and lists hold now.

    Raises:
        UserError: one cannot be read.
    """
    return {
        "train_lmdb": data_identity(Path(data.train_lmdb)),
        "val_lmdb": data_identity(Path(data.val_lmdb)),
    }


def check_data(run: RunPlan, before: Mapping[DataName, LmdbIdentity]) -> None:
    """Refuse to go on with data that hold something else than ``before``; what that lacks is not compared.

    Raises:
        UserError: one has been replaced, or cannot be read.
    """
    accept = f"go on with this one by {ACCEPT}: {resume_command(run.folder)} {ACCEPT}"
    _refuse_replaced(run.recipe.data, before, "the run", f"put that one back and resume, or {accept}")


def check_data_of_sweep(data: DataSettings, before: Mapping[DataName, LmdbIdentity]) -> None:
    """As `check_data`, for a further run of a sweep, whose first one had the data ``before``."""
    _refuse_replaced(data, before, "the sweep", "put that one back, or start a new sweep")


def _refuse_replaced(
    data: DataSettings, before: Mapping[DataName, LmdbIdentity], started: str, mend: str
) -> None:
    problems = []
    for name, now in data_of(data).items():
        path = getattr(data, name)
        difference = before[name].difference(now) if name in before else None
        if difference is not None:
            problems.append(
                f"{_kind(path)} {path} (data.{name}) is not the one that {started} was started with: "
                f"{difference}; {mend}"
            )
    if problems:
        raise UserErrors(problems) if len(problems) > 1 else UserError(problems[0])


def _kind(path: str) -> str:
    return "the list" if Path(path).is_file() else "LMDB"
