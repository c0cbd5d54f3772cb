"""A small disk that can be filled: a tmpfs, in a namespace that only a case and what it starts are in."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from faults.cases import Broken

FILLER = "filler"

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


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """The disk in the case's ``folder``; if the case is broken, what is on it is copied beside it."""
    disk = folder / DISK
    if not disk.is_mount():
        raise RuntimeError(f"{disk} is no disk of its own")
    try:
        yield disk
    except BaseException:
        shutil.copytree(disk, folder / "disk_as_it_was", ignore=shutil.ignore_patterns(FILLER))
        raise


def check_words(said: str) -> None:
    """A command that failed says that it was the disk.

    Raises:
        Broken: it does not.
    """
    if not any(word in said for word in ("disk", "No space left")):
        raise Broken("the disk was full, and the message does not say so")


def fill(filler: Path, left: int) -> bool:
    """Leave ``left`` bytes free, or what is free if that is less."""
    while (size := shutil.disk_usage(filler.parent).free - left) > 0:
        with filler.open("ab") as file:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, 2), size)
            except OSError:
                continue  # something else was written at the same time
    return True
