"""Processes that have no use without the one that started them."""

from __future__ import annotations

import ctypes
import signal
from contextlib import suppress

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that this process gets when its parent ends."""


def end_with_parent() -> None:
    """Have Linux kill this process when its parent ends, however that ends.

    It would hold a GPU and the lock of the run's folder, and write into it, with nobody there to ask it to
    stop.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
