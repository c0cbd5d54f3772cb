"""Carries out one case, in a process and a folder of its own.

python -m faults.one_case SEED NUMBER SHARED FOLDER
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

from digits_run import write_lmdbs

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.discovery import find_engine
from faults import hostile
from faults.cases import ENGINES, Broken, Case, Result
from faults.disturbed import DisturbedRun
from faults.interrupted_lmdb import interrupted, on_full_disk
from faults.small_disk import DISK, on_small_disk, small_disk, why_not
from faults.training import disturbed_training, undisturbed

RESULT = "result.json"
PREPARE = "prepare"


def prepare(shared: Path, engine: str) -> None:
    """The undisturbed run of an engine, in a folder of ``shared``; its data are made with it.

    Raises:
        UserError: the engine is not here.
        Broken: not even this run ends well.
    """
    caffe = executable(engine)
    folder = shared / engine
    folder.mkdir(parents=True)
    write_lmdbs(folder)
    undisturbed(folder, caffe)


def executable(engine: str) -> Path | None:
    """The caffe program to train with; None: on PyTorch.

    Raises:
        UserError: it is not here, or lacks what pruning needs.
    """
    found = find_engine(None, engine)
    if engine == "torch":
        return None
    if found.info.pycaffe is None:
        raise UserError("; ".join(found.info.notes))
    return found.info.executable


def carry_out(case: Case, shared: Path, folder: Path) -> Counter[str]:
    """Do it, with the undisturbed runs in ``shared``; what was done.

    Raises:
        Broken: a promise was not kept.
    """
    dice = case.dice()
    reference = shared / case.engine / "run" if case.engine else finished_run(shared)
    if case.engine or "lmdb" in case.kind:
        write_lmdbs(folder)
    match case.kind:
        case "kills" | "signals" | "damage":
            run = DisturbedRun(folder, executable(case.engine))
            return disturbed_training(case.kind, run, reference, dice)
        case "disk":
            with small_disk(folder) as disk:
                run = DisturbedRun(folder, executable(case.engine), f"{disk.name}/run")
                return disturbed_training(case.kind, run, reference, dice)
        case "lmdb":
            return interrupted(folder / "digits" / "train", folder, dice)
        case "lmdb disk":
            with small_disk(folder) as disk:
                return on_full_disk(folder / "digits" / "train", folder, disk, dice)
        case "logs":
            return hostile.logs(folder, reference, dice)
        case "archives":
            return hostile.archives(folder, dice)
        case "images":
            return hostile.images(folder, dice)
        case _:
            return hostile.files(folder, dice)


def finished_run(shared: Path) -> Path:
    return next(run for engine in ENGINES if (run := shared / engine / "run").is_dir())


def command(case: Case, shared: Path, folder: Path) -> list[str]:
    """The command that carries the case out, with what it needs around it."""
    words = [
        sys.executable,
        "-m",
        "faults.one_case",
        str(case.seed),
        str(case.number),
        str(shared),
        str(folder),
    ]
    if "disk" not in case.kind:
        return words
    (folder / DISK).mkdir()
    return on_small_disk(words, folder / DISK)


def cannot_run(case: Case) -> str | None:
    return why_not() if "disk" in case.kind else None


def main() -> None:
    seed, number, shared, folder = sys.argv[1:]
    result, begun = Result(), time.monotonic()
    try:
        if seed == PREPARE:
            prepare(Path(shared), number)
        else:
            result.done = carry_out(Case(int(seed), int(number)), Path(shared), Path(folder))
    except Broken as broken:
        result.broken = str(broken)
    except UserError as error:
        result.not_run = str(error)
    result.seconds = time.monotonic() - begun
    result.write(Path(folder) / RESULT)


if __name__ == "__main__":
    main()
