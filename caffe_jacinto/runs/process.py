"""Start a command that survives the loss of the terminal, writes to a log by itself, and can be stopped."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from caffe_jacinto.common.files import PACKAGE
from caffe_jacinto.common.processes import WARNINGS

ENVIRONMENT = {
    # All of Caffe's lines go to the log, and only there. Otherwise glog keeps copies in /tmp, or a level set
    # in the user's environment hides the progress.
    "GLOG_logtostderr": "1",
    "GLOG_minloglevel": "0",
    "PYTHONUNBUFFERED": "1",
}

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
"""What each further request to stop sends. At SIGINT, Caffe writes a snapshot."""


class Child:
    """A command in a session of its own: Ctrl-C and hang-ups of the terminal reach it only through us."""

    def __init__(self, argv: Sequence[str], log: Path, lock: Sequence[int]) -> None:
        """Start ``argv``, which inherits the descriptors ``lock``; its output is appended to ``log``.

        Raises:
            OSError: it cannot be started.
        """
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": _python_path()},
                pass_fds=lock,
                start_new_session=True,
            )
        self._requests = 0
        """How many requests to stop have been sent."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def exit_code(self) -> int:
        """Its exit code; the negative number of the signal that ended it."""
        return self._process.wait()

    def wait(self) -> None:
        """Wait until it has ended."""
        self._process.wait()

    def stop(self, request: int) -> None:
        """Escalate: SIGINT, SIGTERM, SIGKILL for request 1, 2, 3. At the first, it can write a snapshot.

        A request that has been sent is not sent again.
        """
        if request > self._requests:
            self._requests = request
            self._send(STOP_SIGNALS[min(request, len(STOP_SIGNALS)) - 1])

    def kill(self) -> None:
        """End it at once, without a snapshot."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.ended():
            return
        with suppress(ProcessLookupError):
            if number == signal.SIGINT:
                self._process.send_signal(number)
            else:
                os.killpg(self._process.pid, number)


def _python_path() -> str:
    """The engines' programs are found from any folder, even where this package is not installed."""
    return os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))


class StopSignals:
    """Passes requests to stop on to the running command, escalating each time; ignores SIGHUP.

    They are Ctrl-C, SIGTERM, and a batch system's warning that it will end the job.
    """

    def __init__(self) -> None:
        self.count = 0
        """How often a stop was requested."""

        self.number = 0
        """The first of the signals."""

        self._child: Child | None = None
        for number in (signal.SIGINT, signal.SIGTERM, *WARNINGS):
            signal.signal(number, self._request)
        # The terminal may close; the run continues.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    @property
    def requested(self) -> bool:
        return self.count > 0

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as in shells."""
        return 128 + self.number

    def pass_on_to(self, child: Child | None) -> None:
        """Send signals to ``child`` from now on, and at once those that came while it was being started."""
        self._child = child
        if child is not None:
            child.stop(self.count)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.number = self.number or number
        if self._child is not None:
            self._child.stop(self.count)
