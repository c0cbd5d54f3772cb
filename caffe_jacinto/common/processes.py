"""What a process asks of the system: signals as ``caffe train`` takes them, its memory, its parent."""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress
from types import FrameType

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that this process gets when its parent ends."""


WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""What batch systems send some time before they end a job (Slurm's ``--signal``): requests to stop."""


EXPLAINED = {
    "SIGKILL": " (out of memory, or killed by hand)",
    "SIGXFSZ": " (a file has grown to the limit that ulimit -f shows)",
}


def describe_exit(code: int) -> str:
    """An exit code in words: ``exit code 1``, ``killed by SIGKILL``."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}{EXPLAINED.get(name, '')}"


class StopRequests:
    """What signals have requested: SIGHUP takes a snapshot; the others stop after the iteration."""

    def __init__(self) -> None:
        self.stop = False
        self._snapshot = False
        self.install()

    def install(self) -> None:
        """Handle the signals; call it again after Caffe has started, which handles SIGTERM itself."""
        for number in (signal.SIGINT, signal.SIGTERM, *WARNINGS):
            signal.signal(number, self._request_stop)
        # Under nohup SIGHUP is ignored from the start, and stays so.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._request_snapshot)

    def take_snapshot(self) -> bool:
        """Whether a snapshot was requested since the last call."""
        requested, self._snapshot = self._snapshot, False
        return requested

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop = True

    def _request_snapshot(self, number: int, frame: FrameType | None) -> None:
        self._snapshot = True


def keep_freed_memory() -> None:
    """Have this process keep what it frees, for its next images or blobs of the same sizes.

    By default glibc returns large blocks to the system, which zeroes them page by page when they are needed
    again: up to a third of the time of decoding a photograph, and a cost in every pass over a network
    (bench/create_lmdb.py, bench/torch_train.py). Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def end_with_parent(parent: int) -> None:
    """Have Linux kill this process when its ``parent`` ends, however that ends, or has ended already.

    Otherwise it would keep a GPU and the lock of the run folder, with nobody there to stop it.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before this asked to be told
        os.kill(os.getpid(), signal.SIGKILL)
