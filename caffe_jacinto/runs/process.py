"""Start a command that outlives a lost terminal, writes to a log file by itself, and takes orders to stop."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from caffe_jacinto.common.files import PACKAGE

ENVIRONMENT = {
    # Caffe's lines go to the log only, all of them: without these, glog keeps copies in /tmp, or a level set
    # in the user's environment hides the progress.
    "GLOG_logtostderr": "1",
    "GLOG_minloglevel": "0",
    "PYTHONUNBUFFERED": "1",
}

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
"""What each further wish to stop sends: Caffe writes a snapshot at SIGINT."""


class Child:
    """A command in a session of its own: no Ctrl-C and no hang-up of our terminal reaches it but by us."""

    def __init__(self, argv: Sequence[str], log: Path, lock: int) -> None:
        """Start ``argv`` with its output appended to ``log``; it inherits the descriptor ``lock``.

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
                pass_fds=(lock,),
                start_new_session=True,
            )
        self._wishes = 0
        """How many wishes to stop have been sent."""

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
        """Until it has ended."""
        self._process.wait()

    def stop(self, wish: int) -> None:
        """Ask it to stop, harder with each further ``wish``: the first, 1, lets it write a snapshot.

        A wish that it has been told of is not told again.
        """
        if wish > self._wishes:
            self._wishes = wish
            self._send(STOP_SIGNALS[min(wish, len(STOP_SIGNALS)) - 1])

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
    """The engines' own programs are found in any folder, also where this package is not installed."""
    return os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))


def describe_exit(code: int) -> str:
    """An exit code in words: ``exit code 1``, ``killed by SIGKILL``."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    reason = " (out of memory, or killed by hand)" if -code == signal.SIGKILL else ""
    return f"killed by {name}{reason}"


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
