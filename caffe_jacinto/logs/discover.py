"""Paths -> runs, each with its stages read from their logs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import parse_json
from caffe_jacinto.logs.events import moment
from caffe_jacinto.logs.history import StageHistory
from caffe_jacinto.logs.printed_net import PrintedNet
from caffe_jacinto.logs.series import StageCurves
from caffe_jacinto.logs.stage import StageFigures, StageLog, read_stage

STAGE_ORDER = ("train", "initial", "l1reg", "sparse", "finetune", "quantize", "test")
STAGE_LOG = "run.log"
"""The log of a stage folder."""
RUN_RECORD = "run.json"

_STAGE_FILE = re.compile(rf"(?:(?P<run>.+)[_.-])?(?P<stage>{'|'.join(STAGE_ORDER)})", re.IGNORECASE)
_LOG_NAME = re.compile(r".+\.log|.+\.log\.INFO\..+|.+\.INFO", re.IGNORECASE)


@dataclass(frozen=True)
class Stage:
    """A stage of a run, as its log describes it."""

    name: str
    log: Path
    figures: StageFigures
    curves: StageCurves | None
    history: StageHistory | None = None
    """What a page shows, where it was asked for; then also `net`."""
    net: PrintedNet | None = None


@dataclass(frozen=True)
class Run:
    """Stages in their order."""

    name: str
    stages: list[Stage]


@dataclass(frozen=True)
class _LogFile:
    path: Path
    folder: Path
    """The run's folder: logs with the same folder and `run` belong together."""
    run: str
    stage: str | None
    """None: the log decides."""


def find_runs(
    paths: Sequence[Path], *, curves: bool = False, history: bool = False
) -> tuple[list[Run], list[UserError]]:
    """Read every log under ``paths``: log files, stage folders, run folders, folders of runs.

    Returns the runs in the order of the paths, and the problems of paths that could not be read.
    """
    problems: list[UserError] = []
    groups: dict[tuple[Path, str], list[Stage]] = {}
    seen: set[Path] = set()
    for path in paths:
        try:
            files = list(_log_files(path))
        except UserError as problem:
            problems.append(problem)
            continue
        for file in files:
            real = file.resolve()
            if real in seen:
                continue
            seen.add(real)
            found = _identify(file)
            try:
                log = read_stage(file, curves=curves, history=history)
            except UserError as problem:
                # A stage that has just begun has an empty log, which is not a mistake in a folder.
                if file == path or _size(file) != 0:
                    problems.append(problem)
                continue
            groups.setdefault((found.folder, found.run), []).append(_stage(found, log))
        if files and all(_size(file) == 0 for file in files) and path not in files:
            problems.append(UserError(f"{path}: every log in it is still empty"))
    return [Run(name, _in_order(folder, stages)) for (folder, name), stages in groups.items()], problems


def _log_files(path: Path) -> Iterator[Path]:
    """The logs that ``path`` stands for.

    Raises:
        UserError: it does not exist, cannot be read, or has no log in it.
    """
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if not path.is_dir():
            yield path
            return
        found = list(_walk(path))
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror}") from None
    if not found:
        raise UserError(f"{path}: holds no log (no file named *.log in it or below)")
    yield from found


def _walk(top: Path) -> Iterator[Path]:
    """Logs in ``top`` and below, by name; of a stage folder, only its run.log."""
    visited: set[tuple[int, int]] = set()  # links may lead round in a circle
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            children = sorted((entry.name, entry.is_dir(), entry.is_file()) for entry in entries)
        files = [name for name, _, is_file in children if is_file]
        if STAGE_LOG in files:
            yield folder / STAGE_LOG
        elif RUN_RECORD not in files:
            yield from (folder / name for name in files if _LOG_NAME.fullmatch(name))
        folders = [name for name, is_folder, _ in children if is_folder and not name.startswith(".")]
        waiting += [folder / name for name in reversed(folders)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _identify(path: Path) -> _LogFile:
    """Which run and stage a log belongs to, by its name and place."""
    parent = path.parent.resolve()
    stem = re.sub(r"(\.log|\.txt)$", "", path.name, flags=re.IGNORECASE)
    in_stage_folder = parent.name.lower() in STAGE_ORDER or (parent.parent / RUN_RECORD).is_file()
    if in_stage_folder and (path.name == STAGE_LOG or not _STAGE_FILE.fullmatch(stem)):
        return _LogFile(path, parent.parent, parent.parent.name or "run", parent.name)
    match = _STAGE_FILE.fullmatch(stem)
    if match is not None:
        return _LogFile(path, parent, match["run"] or parent.name or "run", match["stage"].lower())
    if path.name == STAGE_LOG:
        return _LogFile(path, parent, parent.name or "run", None)
    return _LogFile(path, parent, stem, None)


def _stage(file: _LogFile, log: StageLog) -> Stage:
    name = file.stage or _stage_name(log.figures())
    return stage_of(name, file.path, log)


def stage_of(name: str, path: Path, log: StageLog) -> Stage:
    """A stage as its ``log``, read from ``path``, describes it now."""
    history = log.history
    return Stage(name, path, log.figures(), log.curves, history, log.net if history is not None else None)


def _stage_name(figures: StageFigures) -> str:
    """The stage's name by the folders in its solver's paths; else by what was done."""
    for path in figures.solver_paths:
        for part in reversed(Path(path).parts[:-1]):
            if part.lower() in STAGE_ORDER:
                return part.lower()
    return "test" if figures.tested else "train"


def _in_order(folder: Path, stages: list[Stage]) -> list[Stage]:
    """The recipe's order where the run's record has it; else the usual order, or by time."""
    recorded = _recorded_order(folder)
    names = {stage.name.lower() for stage in stages}
    if recorded and names <= set(recorded):
        return sorted(stages, key=lambda stage: recorded.index(stage.name.lower()))
    if names <= set(STAGE_ORDER):
        return sorted(stages, key=lambda stage: STAGE_ORDER.index(stage.name.lower()))
    return sorted(stages, key=lambda stage: (stage.name.lower() == "test", _start(stage)))


def _recorded_order(folder: Path) -> list[str]:
    """The names of the stages in run.json, if there is a readable one."""
    try:
        record = parse_json((folder / RUN_RECORD).read_text(encoding="utf-8"))
        return [str(name).lower() for name in record["stages"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _start(stage: Stage) -> datetime:
    """When the log begins. A log without a year is assumed to be of the year it was last written in."""
    year = stage.figures.year
    if year is None:
        try:
            year = datetime.fromtimestamp(stage.log.stat().st_mtime).year
        except OSError:
            year = None
    found = moment(stage.figures.start_stamp, year) if stage.figures.start_stamp else None
    return found or datetime.min
