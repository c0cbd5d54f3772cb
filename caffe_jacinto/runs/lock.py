"""One trainer per run folder.

The lock is an flock on the run folder itself and one on a file in it, which says who took it. The first
holds even if the file is deleted. The second is what a `run.sh` of earlier versions takes, and all there is
where the file system cannot lock a folder (NFS). The commands that a run starts inherit the locked
descriptors, so the lock is held as long as anything trains: a Caffe that outlives a killed driver still holds
it, even if process numbers are reused. `run.sh` takes the same locks when it is started by hand.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import stat
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.common.files import parse_json

LOCK_NAME = "lock"
RELEASE_SECONDS = 0.5
"""How long to wait for a holder that is about to end."""


SLURM_DRIVER = "submitit.core._submit"
"""The module that calls `runs.slurm_job.train_in_job` in a Slurm job."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a run's lock."""

    pid: int
    words: tuple[str, ...]
    """Its command line."""

    @property
    def is_driver(self) -> bool:
        words = self.words[:8]
        # python -m caffe_jacinto.train; python -m caffe_jacinto train; caffe-jacinto train
        programs = ("caffe_jacinto", "caffe-jacinto")
        return not {"caffe_jacinto.train", SLURM_DRIVER}.isdisjoint(words) or any(
            Path(program).name in programs and command == "train" for program, command in pairwise(words)
        )

    @property
    def is_shell(self) -> bool:
        """Whether it is a run.sh, which waits for the Caffe that it has started."""
        return bool(self.words) and Path(self.words[0]).name in ("sh", "bash", "dash")

    def command(self) -> str:
        """The start of its command line, on one line."""
        text = " ".join(" ".join(self.words).split())
        return text if len(text) <= 80 else text[:77] + "..."


class RunLock:
    """The lock of a run folder, held from `acquire` until the last process that has it releases it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._descriptors: tuple[int, ...] = ()

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The descriptors that a child inherits to hold the lock too."""
        if not self._descriptors:
            raise RuntimeError("the lock is not held")
        return self._descriptors

    def acquire(self, seconds: float = RELEASE_SECONDS) -> None:
        """Take the lock; wait up to ``seconds`` for a holder to end.

        Raises:
            UserError: another process has it; the message names that process and says what to do.
        """
        descriptors = _opened(self.path, os.O_RDWR | os.O_CREAT)
        try:
            if not all(_try_lock(descriptor, seconds) for descriptor in descriptors):
                raise UserError(_refusal(self.path))
            _write_owner(descriptors[-1])
        except BaseException:
            _close(descriptors)
            raise
        self._descriptors = descriptors

    def release(self) -> None:
        """Release the lock. A child that still runs keeps it."""
        _close(self._descriptors)
        self._descriptors = ()


def is_held(folder: Path) -> bool:
    """Whether something trains in ``folder`` now; on any machine, if the file system shares locks."""
    path = folder / LOCK_NAME
    try:
        descriptors = _opened(path, os.O_RDONLY) if path.exists() else (_open_folder(folder),)
    except OSError:
        return False
    try:
        return any(map(_is_locked, descriptors))
    finally:
        _close(descriptors)


def _opened(lock: Path, flags: int) -> tuple[int, ...]:
    """The descriptors of the run folder and of the file ``lock`` in it."""
    folder = _open_folder(lock.parent)
    try:
        return folder, os.open(lock, flags | os.O_CLOEXEC, 0o666)
    except BaseException:
        os.close(folder)
        raise


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    return False


def holders(folder: Path) -> list[Holder]:
    """The processes of this machine that have the lock open, as far as this user may see them."""
    wanted = set()
    for path in (folder, folder / LOCK_NAME):
        with suppress(OSError):
            status = path.stat()
            wanted.add((status.st_dev, status.st_ino))
    found = [
        Holder(pid, _words(pid)) for pid in _processes() if pid != os.getpid() and _has_open(pid, wanted)
    ]
    return sorted(found, key=lambda holder: (holder.is_shell, holder.pid))


def _try_lock(descriptor: int, seconds: float) -> bool:
    give_up = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EBADF, errno.ENOTSUP) and stat.S_ISDIR(os.fstat(descriptor).st_mode):
                return True  # this file system locks files, but no folders
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"cannot lock the run folder: {error.strerror}; use a file system with file locks"
                ) from None
        if time.monotonic() >= give_up:
            return False
        time.sleep(0.05)


def _write_owner(descriptor: int) -> None:
    owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, owner.encode(), 0)


def _refusal(path: Path) -> str:
    folder = path.parent
    found = holders(folder)
    drivers = [holder for holder in found if holder.is_driver]
    if drivers:
        return (
            f"{folder}: train is already running there (process {drivers[0].pid}); "
            f"watch it: python -m caffe_jacinto.train --status {shlex.quote(str(folder))}"
        )
    if found:
        left = found[0]
        return (
            f"{folder}: process {left.pid} ({left.command()}), left over from a train that was killed or "
            f"started by hand, is still training there; wait for it to end, or stop it: kill -INT {left.pid} "
            "(it writes a snapshot first), and then resume"
        )
    host, pid = _owner(path)
    return (
        f"{folder}: another process holds its lock (taken by process {pid} on {host}); "
        "wait for it to end, or stop it there"
    )


def _owner(path: Path) -> tuple[str, str]:
    try:
        owner = parse_json(path.read_text())
        return str(owner["host"]), str(owner["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown machine", "?"


def _processes() -> Iterator[int]:
    try:
        names = [path.name for path in Path("/proc").iterdir()]
    except OSError:
        return
    yield from (int(name) for name in names if name.isdigit())


def _has_open(pid: int, wanted: Collection[tuple[int, int]]) -> bool:
    """Whether a process has one of these files open, each given by its device and inode."""
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False
    for descriptor in descriptors:
        try:
            status = descriptor.stat()
        except OSError:
            continue
        if (status.st_dev, status.st_ino) in wanted:
            return True
    return False


def _words(pid: int) -> tuple[str, ...]:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(line.decode(errors="replace").rstrip("\0").split("\0"))
