"""Wishes to stop that come as signals, and a terminal that goes away."""

from __future__ import annotations

import signal
from types import FrameType

from caffe_jacinto.runs.process import Child


class StopSignals:
    """Passes Ctrl-C and SIGTERM on to the command that runs, each further one harder; ignores SIGHUP."""

    def __init__(self) -> None:
        self.count = 0
        """How often it was asked to stop."""

        self.number = 0
        """The signal that asked first."""

        self._child: Child | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._asked)
        # The terminal may close; the run goes on.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    @property
    def asked(self) -> bool:
        return self.count > 0

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells have it."""
        return 128 + self.number

    def pass_on_to(self, child: Child | None) -> None:
        """From now on signals go to ``child``; one that came while it was started goes there at once."""
        self._child = child
        if child is not None:
            child.stop(self.count)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.number = self.number or number
        if self._child is not None:
            self._child.stop(self.count)
