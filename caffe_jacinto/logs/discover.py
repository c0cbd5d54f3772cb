"""Paths -> runs, each with its stages read from their logs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path, PureWindowsPath

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import parse_json
from caffe_jacinto.logs.events import moment
from caffe_jacinto.logs.history import StageHistory
from caffe_jacinto.logs.printed_net import PrintedNet
from caffe_jacinto.logs.processes import LogStage, read_log
from caffe_jacinto.logs.stage import StageFigures, StageLog

TEST_STAGES = ("test", "quantize", "test_quantize")
STAGE_ORDER = ("train", "initial", "l1reg", "sparse", "finetune", *TEST_STAGES)
STAGE_LOG = "run.log"
"""The log of a stage folder."""
RUN_RECORD = "run.json"

_STAGE_FILE = re.compile(rf"(?:(?P<run>.+)[_.-])?(?P<stage>{'|'.join(STAGE_ORDER)})", re.IGNORECASE)
_LOG_NAME = re.compile(r".+\.log|.+\.log\.INFO\..+|.+\.INFO", re.IGNORECASE)
_SCRIPT_LOG = re.compile(r"train-log_.*\.txt", re.IGNORECASE)
"""What a script of the fork writes for all of its stages, in the run's folder."""
_DIGITS_LOG = "caffe_output.log"
"""The log of a job of NVIDIA's DIGITS, in the job's folder."""


@dataclass(frozen=True)
class Stage:
    """A stage of a run, as its log describes it."""

    name: str
    log: Path
    figures: StageFigures
    train_images: int | None = None
    """How many there are, by the run's record."""
    history: StageHistory | None = None
    """The curves, where they were asked for; then also `net`."""
    net: PrintedNet | None = None

    @property
    def iterations_per_epoch(self) -> float | None:
        """Updates in which all training images are used once, where log or record say how many there are."""
        images, per_iteration = self.train_images, self.figures.images_per_iteration
        if self.figures.iterations_per_epoch is None and images and per_iteration:
            return images / per_iteration
        return self.figures.iterations_per_epoch


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
    recorded: bool = False
    """Whether this program wrote it, as the log of one stage."""
    is_named_test: bool = False
    """Whether its name is a run's, with that of a test appended."""


def find_runs(
    paths: Sequence[Path], *, history: bool = False, every_point: bool = False
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
                logs = read_log(file, history=history, every_point=every_point, one_stage=found.recorded)
            except UserError as problem:
                # A stage that has just begun has an empty log, which is not a mistake in a folder.
                if file == path or _size(file) != 0:
                    problems.append(problem)
                continue
            place, own = _place_of(found, logs)
            groups.setdefault(place, []).extend(own)
        if files and all(_size(file) == 0 for file in files) and path not in files:
            problems.append(UserError(f"{path}: every log in it is still empty"))
    names = _run_names(list(groups))
    return [_run(place[0], names[place], stages) for place, stages in groups.items()], problems


def _run(folder: Path, name: str, stages: list[Stage]) -> Run:
    """The run in ``folder``, with what its record says; no two stages have the same name."""
    order, images = _recorded(folder)
    found: list[Stage] = []
    taken: set[str] = set()
    for stage in _in_order(order, stages):
        unique = _free(stage.name, taken)
        found.append(replace(stage, name=unique, train_images=images))
    return Run(name, found)


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number if it is taken; now it is."""
    found, number = name, 2
    while found in taken:
        found, number = f"{name} {number}", number + 1
    taken.add(found)
    return found


def _run_names(places: Sequence[tuple[Path, str]]) -> dict[tuple[Path, str], str]:
    """A name for each run: its own, or with as many of the folders around it as tell it from the others."""
    found: dict[tuple[Path, str], str] = {}
    same: dict[str, list[tuple[Path, str]]] = {}
    for place in places:
        same.setdefault(place[1], []).append(place)
    taken: set[str] = set()
    for name, group in same.items():
        around = [(folder.parent if folder.name == name else folder).parts[1:] for folder, _ in group]
        depth = _depth(around)
        for place, parts in zip(group, around, strict=True):
            found[place] = _free("/".join([*parts[max(0, len(parts) - depth) :], name]), taken)
    return found


def _depth(around: Sequence[tuple[str, ...]]) -> int:
    """The fewest last parts of paths that tell as many of them apart as the whole paths do."""
    depth, apart = 0, 1
    for most in range(1, max(map(len, around), default=0) + 1):
        count = len({parts[-most:] for parts in around})
        if count > apart:
            depth, apart = most, count
    return depth


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


def _walk(top: Path) -> list[Path]:
    """Logs in ``top`` and below, by name; of a stage folder, only its run.log.

    The log of the fork's scripts repeats what the logs of the stages hold, so it counts only without them.
    """
    visited: set[tuple[int, int]] = set()  # links may lead round in a circle
    waiting = [top]
    found: list[Path] = []
    of_scripts: set[Path] = set()
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
            found.append(folder / STAGE_LOG)
        elif RUN_RECORD not in files:
            scripts = {folder / name for name in files if _SCRIPT_LOG.fullmatch(name)}
            of_scripts |= scripts
            found += [
                folder / name for name in files if _LOG_NAME.fullmatch(name) or folder / name in scripts
            ]
        folders = [name for name, is_folder, _ in children if is_folder and not name.startswith(".")]
        waiting += [folder / name for name in reversed(folders)]
    with_others = {parent for path in found if path not in of_scripts for parent in path.parents}
    return [path for path in found if path not in of_scripts or path.parent not in with_others]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _identify(path: Path) -> _LogFile:
    """Which run and stage a log belongs to, by its name and place."""
    parent = path.parent.resolve()
    stem = re.sub(r"(\.log|\.txt)$", "", path.name, flags=re.IGNORECASE)
    recorded = (parent.parent / RUN_RECORD).is_file()
    match = _STAGE_FILE.fullmatch(stem)
    # RUN/initial/run.log, train.log, test.log; but RUN_A_sparse.log names its own run.
    names_its_run = path.name != STAGE_LOG and match is not None and match["run"] is not None
    if (parent.name.lower() in STAGE_ORDER or recorded) and not names_its_run:
        recorded = recorded and path.name == STAGE_LOG
        return _LogFile(path, parent.parent, parent.parent.name or "run", parent.name, recorded)
    if match is not None:
        run, stage = match["run"], match["stage"].lower()
        is_named_test = run is not None and stage in TEST_STAGES
        return _LogFile(path, parent, run or parent.name or "run", stage, is_named_test=is_named_test)
    if path.name in (STAGE_LOG, _DIGITS_LOG) or _SCRIPT_LOG.fullmatch(path.name):
        return _LogFile(path, parent, parent.name or "run", None)
    return _LogFile(path, parent, stem, None)


def _place_of(file: _LogFile, logs: Sequence[LogStage]) -> tuple[tuple[Path, str], list[Stage]]:
    """The run of a file (its folder and name) and the stages in it.

    What is called RUN_test.log and holds a training does not belong to RUN.
    """
    found = _stages(file, logs)
    trains = any(stage.figures.trained for stage in found)
    if file.is_named_test and trains:
        return (file.folder, file.path.stem), found
    return (file.folder, file.run), found


def _stages(file: _LogFile, logs: Sequence[LogStage]) -> list[Stage]:
    """The stages of a file, each with a name of its own."""
    found: list[Stage] = []
    taken: dict[str, int] = {}
    for part in logs:
        figures = part.log.figures()
        name = (file.stage or "") if file.recorded else _stage_name(figures, file.stage, alone=len(logs) == 1)
        name += f" ({part.label})" if part.label else ""
        taken[name] = times = taken.get(name, 0) + 1
        found.append(_stage_of(f"{name} {times}" if times > 1 else name, file.path, part.log, figures))
    return found


def stage_of(name: str, path: Path, log: StageLog) -> Stage:
    """A stage as its ``log``, read from ``path``, describes it now."""
    return _stage_of(name, path, log, log.figures())


def _stage_of(name: str, path: Path, log: StageLog, figures: StageFigures) -> Stage:
    history = log.history
    return Stage(name, path, figures, history=history, net=log.net if history is not None else None)


def _stage_name(figures: StageFigures, given: str | None, *, alone: bool) -> str:
    """The stage's name by what its log holds; ``given`` is that of its file, which may be ``alone`` in it.

    A test is a test, and a training none, whatever the file is called. The stage of a training is that of the
    folders in its solver's paths, or the file's.
    """
    if figures.timed:
        return "time"
    if figures.tested:
        own = "test_quantize" if figures.quantized else "test"
        return given if given and alone and given.lower() in TEST_STAGES else own
    if not figures.began and not alone:
        return "failed start" if figures.fatal else given or "train"
    if given and alone and (given.lower() not in TEST_STAGES or not figures.trained):
        return given
    for path in figures.solver_paths:
        for part in reversed(PureWindowsPath(path).parts[:-1]):  # which / separates, too
            if part.lower() in STAGE_ORDER and part.lower() not in TEST_STAGES:
                return part.lower()
    return given if given and given.lower() not in TEST_STAGES else "train"


def _in_order(recorded: list[str], stages: list[Stage]) -> list[Stage]:
    """The recipe's order where the run's record has it; else the usual order, or by time."""
    logs = [stage.log for stage in stages]
    if len(set(logs)) < len(logs):
        return sorted(stages, key=start_of)  # a file with several stages has them in their order
    names = {stage.name.lower() for stage in stages}
    if recorded and names <= set(recorded):
        return sorted(stages, key=lambda stage: recorded.index(stage.name.lower()))
    if names <= set(STAGE_ORDER):
        return sorted(stages, key=lambda stage: (STAGE_ORDER.index(stage.name.lower()), start_of(stage)))
    return sorted(stages, key=lambda stage: (stage.name.lower() == "test", start_of(stage)))


def _recorded(folder: Path) -> tuple[list[str], int | None]:
    """The names of the stages in run.json and how many training images there are, as far as it says so."""
    try:
        record = parse_json((folder / RUN_RECORD).read_text(encoding="utf-8"))
        order = [str(name).lower() for name in record["stages"]]
    except (OSError, ValueError, KeyError, TypeError):
        return [], None
    try:
        images = record["data"]["train_lmdb"]["images"]
    except (KeyError, TypeError):
        images = None  # records of earlier versions
    return order, images if isinstance(images, int) and images > 0 else None


def start_of(stage: Stage) -> datetime:
    """When the log begins.

    A log without a year was last written in the year of its file's time stamp, and does not begin after it.
    """
    stamp, year = stage.figures.start_stamp, stage.figures.year
    written = None
    if year is None:
        try:
            written = datetime.fromtimestamp(stage.log.stat().st_mtime)
        except OSError:
            written = None
    found = moment(stamp, written.year if written is not None else year) if stamp else None
    if found is not None and written is not None and found > written + timedelta(days=1):
        found = moment(stamp or "", written.year - 1) or found
    return found or datetime.min
