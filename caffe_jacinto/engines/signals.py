"""Signals as ``caffe train`` takes them: SIGINT stops after the iteration, SIGHUP takes a snapshot."""

from __future__ import annotations

import signal
from types import FrameType


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
