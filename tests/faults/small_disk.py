"""A small disk that fills while a training writes to it: a tmpfs in a namespace of this process alone."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from faults.cases import Broken
from faults.disturbed import FAILED, FINISHED, REFUSED, DisturbedRun
from faults.training import break_in, train_through

DISK = "disk"
"""The folder of a case at which the disk is mounted."""

MEGABYTES = 400
"""A run needs about 150."""

LEFT = (0, 4096, 100_000, 1_000_000, 4_000_000, 7_000_000, 10_000_000)
"""Bytes that are left free; a snapshot here has two files of 7 MB."""

MOUNT = 'mount -t tmpfs -o "size=$1m" faults "$2" && shift 2 && exec "$@"'


def why_not() -> str | None:
    """Why this machine lends no small disk; None if it does."""
    try:
        tried = subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "faults", "/mnt"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        return f"unshare: {error.strerror}"
    if tried.returncode == 0:
        return None
    return (tried.stderr.strip().splitlines() or ["unshare -rm does not work"])[-1]


def on_small_disk(command: Sequence[str], folder: Path) -> list[str]:
    """``command`` with a small disk, which only it and what it starts see, mounted at ``folder``."""
    return ["unshare", "-rm", "sh", "-c", MOUNT, "sh", str(MEGABYTES), str(folder), *command]


def full_disk(folder: Path, caffe: Path | None, reference: Path, dice: random.Random) -> Counter[str]:
    """A case: the run folder is on the small disk, which fills at any moment, and is cleared again.

    Raises:
        Broken: a promise was not kept.
    """
    disk = folder / DISK
    if not disk.is_mount():
        raise RuntimeError(f"{disk} is no disk of its own")
    run = DisturbedRun(folder, caffe, f"{DISK}/run")

    filler = disk / "filler"

    def disturb(run: DisturbedRun, part: str) -> None:
        left = dice.choice(LEFT)
        code, said = break_in(run, part, dice, lambda driver: _fill(filler, left), "disk filled: {}", ())
        if code != FINISHED:
            _check_words(said)
            if dice.random() < 0.3:
                _try_again(run)
        filler.unlink(missing_ok=True)

    try:
        train_through(run, reference, dice, disturb)
    except BaseException:
        shutil.copytree(disk, folder / "disk_as_it_was", ignore=shutil.ignore_patterns("filler"))
        raise
    return run.done


def _try_again(run: DisturbedRun) -> None:
    """Go on while the disk is still full."""
    masks = run.before()
    code, said = run.go_on().finish(FINISHED, FAILED, REFUSED)
    run.remember_frozen(masks, said)
    if code != FINISHED:
        run.done["resume tried while the disk was full"] += 1


def _check_words(said: str) -> None:
    if not any(word in said for word in ("disk", "No space left")):
        raise Broken("the disk was full, and the message does not say so")


def _fill(filler: Path, left: int) -> bool:
    """Leave ``left`` bytes free, or what is free if that is less."""
    while (size := shutil.disk_usage(filler.parent).free - left) > 0:
        with filler.open("ab") as file:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, 2), size)
            except OSError:
                continue  # something else was written at the same time
    return True
