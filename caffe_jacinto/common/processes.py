"""Signals as ``caffe train`` takes them: SIGINT stops after the iteration, SIGHUP takes a snapshot."""

from __future__ import annotations

import ctypes
import signal
from contextlib import suppress
from types import FrameType

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""

_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Have this process keep what it frees, for its next images or blobs of the same sizes.

    By default glibc hands large blocks back to the system, which gives them out again page by page, filled
    with zeros: up to a third of the time of decoding a photograph, and every pass over a network would pay
    for it, too (bench/create_lmdb.py, bench/torch_train.py). Another C library than glibc is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, 2**30)
    mallopt(_M_TRIM_THRESHOLD, _LARGEST)


_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that this process gets when its parent ends."""


def end_with_parent() -> None:
    """Have Linux kill this process when its parent ends, however that ends.

    It would hold a GPU and the lock of the run's folder, and write into it, with nobody there to ask it to
    stop.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Requests:
    """What signals have asked for since they were last looked at. SIGTERM stops, too."""

    def __init__(self) -> None:
        self.stop = False
        self._snapshot = False
        self.install()

    def install(self) -> None:
        """Take the signals; to be called again once Caffe is started, which takes SIGTERM for itself."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask_stop)
        # Started under nohup, SIGHUP is ignored, and stays so.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._ask_snapshot)

    def take_snapshot(self) -> bool:
        """Whether a snapshot is asked for; asked once, it is given once."""
        asked, self._snapshot = self._snapshot, False
        return asked

    def _ask_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop = True

    def _ask_snapshot(self, number: int, frame: FrameType | None) -> None:
        self._snapshot = True
