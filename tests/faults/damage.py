"""Files of a run that are damaged, lost or exchanged between two of its commands."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fuzzing import damaged

from caffe_jacinto.pruning.pruner import MASKS_SUFFIX

ENDINGS = (".caffemodel", ".solverstate", MASKS_SUFFIX)
"""The files of a snapshot."""


class Damage(NamedTuple):
    """A kind of damage; ``apply`` returns the paths that it has changed, none if nothing was there."""

    name: str
    apply: Callable[[Path, random.Random], list[Path]]
    may_be_refused: bool = False
    """Whether a person may have to put a file right, and is told so; otherwise training goes on."""


def snapshot_files(run: Path, *endings: str) -> list[Path]:
    """The files of snapshots of the stage that was running, the newest first."""
    stages = [log.parent for log in run.glob("*/run.log") if log.parent.name != "test"]
    if not stages:
        return []
    stage = max(stages, key=lambda folder: (folder / "run.log").stat().st_mtime_ns)
    found = [path for path in stage.iterdir() if path.name.endswith(endings or ENDINGS)]
    return sorted(found, key=_iteration, reverse=True)


def _iteration(path: Path) -> int:
    match = re.search(r"_iter_(\d+)\.", path.name)
    return int(match[1]) if match else -1


def _cut(run: Path, dice: random.Random) -> list[Path]:
    paths = snapshot_files(run)[:6]
    return [
        _write(path, path.read_bytes()[: dice.randrange(path.stat().st_size)]) for path in _one(paths, dice)
    ]


def _cut_all(run: Path, dice: random.Random) -> list[Path]:
    paths = snapshot_files(run, ".caffemodel")
    return [_write(path, path.read_bytes()[: dice.randrange(1000)]) for path in paths]


def _empty(run: Path, dice: random.Random) -> list[Path]:
    return [_write(path, b"") for path in _one(snapshot_files(run)[:6], dice)]


def _zero_tail(run: Path, dice: random.Random) -> list[Path]:
    """The end of a file is zeros, as after a power cut: its length was on the disk, its blocks were not."""
    changed = []
    for path in _one(snapshot_files(run)[:3], dice):
        content = path.read_bytes()
        at = len(content) * dice.randrange(2, 8) // 10
        changed.append(_write(path, content[:at] + bytes(len(content) - at)))
    return changed


def _more(run: Path, dice: random.Random) -> list[Path]:
    paths = _one(snapshot_files(run, ".caffemodel", ".solverstate")[:4], dice)
    return [_write(path, path.read_bytes() + b"\xff" * dice.randrange(1, 5000)) for path in paths]


def _delete(run: Path, dice: random.Random) -> list[Path]:
    return [_remove(path) for path in _one(snapshot_files(run)[:6], dice)]


def _delete_masks(run: Path, dice: random.Random) -> list[Path]:
    return [_remove(path) for path in snapshot_files(run, MASKS_SUFFIX)]


def _exchange(*endings: str) -> Callable[[Path, random.Random], list[Path]]:
    def apply(run: Path, dice: random.Random) -> list[Path]:
        paths = snapshot_files(run, *endings)[:2]
        if len(paths) < 2:
            return []
        first, second = paths[0].read_bytes(), paths[1].read_bytes()
        return [_write(paths[0], second), _write(paths[1], first)]

    return apply


def _lose_stage(run: Path, dice: random.Random) -> list[Path]:
    """An earlier stage's folder, whose weights nobody needs any more."""
    stage = snapshot_files(run, ".solverstate")
    earlier = run / "initial"
    if not stage or stage[0].parent == earlier or not earlier.is_dir():
        return []
    shutil.rmtree(earlier)
    return [earlier]


def _other_lmdb(run: Path, dice: random.Random) -> list[Path]:
    """The validation images in the place of the training images."""
    lmdb = run.parent / "train_lmdb/data.mdb"
    return [_write(lmdb, (run.parent / "val_lmdb/data.mdb").read_bytes())]


def _file(name: str, how: Callable[[bytes, random.Random], bytes | None]) -> Callable[..., list[Path]]:
    """Change, or lose, one file of the run folder, or of the stage that was running."""

    def apply(run: Path, dice: random.Random) -> list[Path]:
        stage = snapshot_files(run)
        path = (stage[0].parent if stage else run / "initial") / name[2:] if name[:2] == "*/" else run / name
        if not path.is_file():
            return []
        content = how(path.read_bytes(), dice)
        return [_remove(path) if content is None else _write(path, content)]

    return apply


def _lost(content: bytes, dice: random.Random) -> None:
    return None


def _anyhow(content: bytes, dice: random.Random) -> bytes:
    return damaged(content, [content], dice)


def _cut_off(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randrange(max(len(content), 1))]


def _one_line(content: bytes, dice: random.Random) -> bytes:
    """A log whose line ends are lost, with more headers of commands."""
    return content.replace(b"\n", b"\r" if dice.random() < 0.5 else b" ") * dice.choice((1, 30))


KINDS = (
    Damage("snapshot cut off", _cut),
    Damage("all snapshots of the stage cut off", _cut_all),
    Damage("snapshot empty", _empty),
    Damage("snapshot with zeros at its end", _zero_tail),
    Damage("snapshot with bytes added", _more),
    Damage("file of a snapshot deleted", _delete),
    Damage("all pruning masks deleted", _delete_masks),
    Damage("solver states exchanged", _exchange(".solverstate")),
    Damage("pruning masks exchanged", _exchange(MASKS_SUFFIX)),
    Damage("folder of an earlier stage deleted", _lose_stage, may_be_refused=True),
    Damage("lock deleted", _file("lock", _lost)),
    Damage("log deleted", _file("*/run.log", _lost)),
    Damage("log damaged", _file("*/run.log", _anyhow)),
    Damage("log without line ends", _file("*/run.log", _one_line)),
    Damage("prototxt or solver file deleted", _file("*/solver.prototxt", _lost)),
    Damage("prototxt or solver file damaged", _file("*/train.prototxt", _anyhow)),
    Damage("run.json cut off", _file("run.json", _cut_off), may_be_refused=True),
    Damage("run.json deleted", _file("run.json", _lost), may_be_refused=True),
    Damage("training LMDB cut off", _file("../train_lmdb/data.mdb", _cut_off), may_be_refused=True),
    Damage("training LMDB exchanged for another", _other_lmdb, may_be_refused=True),
    Damage("training LMDB deleted", _file("../train_lmdb/data.mdb", _lost), may_be_refused=True),
)


def _one(paths: list[Path], dice: random.Random) -> list[Path]:
    return [dice.choice(paths)] if paths else []


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _remove(path: Path) -> Path:
    path.unlink()
    return path
