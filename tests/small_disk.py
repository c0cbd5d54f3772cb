"""A real disk of a few megabytes: a tmpfs that only the commands started with it see."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

MOUNT = 'mount -t tmpfs -o "size=$1" small "$2" && echo mounted && exec sleep 1000'


class SmallDisk:
    """The disk, and how to start a command that sees it."""

    def __init__(self, folder: Path, holder: int) -> None:
        """``holder`` is a process in the namespace in which the disk is mounted at ``folder``."""
        enter = ("nsenter", "-t", str(holder), "-U", "-m", "--preserve-credentials")
        # Entering a namespace leaves the folder that a command was started in.
        self.prefix: Sequence[str] = (*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(folder.parent))
        """Before a command: it sees the disk, and runs in the folder above it."""
        self.seen_from_here = Path(f"/proc/{holder}/root") / folder.relative_to("/")
        """The folder of the disk for this process, which does not see it."""

    def fill(self, left: int) -> None:
        """Write a file that leaves ``left`` bytes free."""
        with (self.seen_from_here / "filler").open("wb") as file:
            while (more := shutil.disk_usage(self.seen_from_here).free - left) > 0:
                with suppress(OSError):  # something else was written at the same time
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), more)

    def clear(self) -> None:
        """Remove that file."""
        (self.seen_from_here / "filler").unlink()


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[SmallDisk]:
    """A disk of ``size`` bytes at ``folder``; the test is skipped where the machine does not lend one."""
    folder.mkdir()
    command = ["unshare", "-rm", "sh", "-c", MOUNT, "sh", str(size), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stderr is not None
        try:
            if holder.stdout.readline() != "mounted\n":
                pytest.skip(f"no file system can be mounted here: {holder.stderr.read().strip()}")
            yield SmallDisk(folder, holder.pid)
        finally:
            holder.kill()
