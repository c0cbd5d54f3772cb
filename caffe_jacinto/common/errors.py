"""Errors that a user can mend: one line on stderr and an exit code, never a traceback."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from caffe_jacinto.common.dependencies import why_missing

USER_ERROR = 2
"""Exit code for bad input, the one that argparse uses."""

FAILED = 1
"""Exit code for work that started and did not succeed."""

LOST = 75
"""Exit code for work that something outside cut short, and that can go on as it is (EX_TEMPFAIL)."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""


class UserError(Exception):
    """Something the user can mend: what is wrong, where, and what to do, in one line.

    As text it is always one line: newlines and other characters that are not printable become escapes.
    """

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())

    def lines(self) -> list[str]:
        """What the user is shown: one line for each mistake."""
        return [str(self)]


class UserErrors(UserError):  # noqa: N818 - several of them
    """Several mistakes that were found together. `run_command` shows each on a line of its own."""

    def __init__(self, messages: Sequence[str]) -> None:
        super().__init__("; ".join(messages))
        self._messages = messages

    def lines(self) -> list[str]:
        return [str(UserError(message)) for message in self._messages]


class RunFailed(UserError):  # noqa: N818 - a run that failed is what it is
    """Work that started and failed for a reason outside this program (exit code 1)."""


class WorkLost(RunFailed):
    """Work that something outside cut short (a killed rank, a lost machine); it can go on (exit code 75)."""


def exit_code(error: UserError) -> int:
    """The exit code that goes with an error."""
    if isinstance(error, RunFailed):
        return LOST if isinstance(error, WorkLost) else FAILED
    return USER_ERROR


def invoked_as(program: str) -> str:
    """The name of the running program: ``program``, or ``caffe-jacinto report`` where that started it."""
    return sys.argv[0] if sys.argv[0].startswith("caffe-jacinto ") else program


def run_command(program: str, main: Callable[[Sequence[str]], int]) -> int:
    """Call ``main(sys.argv[1:])`` and turn errors that the user can mend into one line on stderr.

    Returns the exit code: main's own, 2 for a `UserError` and for a package that this Python lacks, 1 for a
    `RunFailed` and for what the system refuses (a full disk behind stdout, no permission), 75 for `WorkLost`,
    130 after Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path that the terminal's encoding cannot show must not end the command.
        sys.stdout.reconfigure(errors="backslashreplace")
    interrupts = _Interrupts()
    try:
        with interrupts.raised():
            code = main(sys.argv[1:])
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except UserError as error:
        for line in error.lines():
            print(f"{program}: error: {line}", file=sys.stderr)
        return exit_code(error)
    except ImportError as error:
        missing = why_missing(error)
        if missing is None:
            if interrupts.came:
                return _interrupted(program)
            raise
        print(f"{program}: error: {missing}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return _interrupted(program)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone.
        _drop_stdout()
        return FAILED
    except OSError as error:
        print(f"{program}: error: {UserError(_of_the_system(error))}", file=sys.stderr)
        _drop_stdout()
        return FAILED
    except Exception:
        # A library may turn Ctrl-C into an error of its own, as pydantic does while it builds a model.
        if not interrupts.came:
            raise
        return _interrupted(program)


def _interrupted(program: str) -> int:
    print(f"{program}: interrupted", file=sys.stderr)
    return INTERRUPTED


def _of_the_system(error: OSError) -> str:
    """What the system refused; where a disk is full, which one, and what to do."""
    from caffe_jacinto.common.disk import is_full, why_not_written

    if not is_full(error) or error.filename is None:
        return str(error)
    return f"{why_not_written(error, Path(str(error.filename)))}; free some space"


class _Interrupts:
    """Ctrl-C while a command works."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, _number: int, _frame: FrameType | None) -> NoReturn:
        """The handler of SIGINT."""
        self.came = True
        raise KeyboardInterrupt

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Ctrl-C is a KeyboardInterrupt inside; before and after, it ends the program (`caffe_jacinto`)."""
        ends_program = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        report = sys.unraisablehook
        if ends_program:
            signal.signal(signal.SIGINT, self)
            sys.unraisablehook = partial(_repeat_interrupt, report)
        try:
            yield
        finally:
            sys.unraisablehook = report
            if ends_program and signal.getsignal(signal.SIGINT) is self:
                signal.signal(signal.SIGINT, signal.SIG_DFL)


def _repeat_interrupt(report: Callable[[Any], object], ignored: Any) -> None:
    """Repeat a Ctrl-C that came where Python ignores errors: in a destructor, in a library's callback.

    ``ignored`` is what `sys.unraisablehook` is called with; ``report`` shows all else.
    """
    if not issubclass(ignored.exc_type, KeyboardInterrupt):
        report(ignored)
        return
    from threading import Timer, main_thread

    # A little later, when Python is back from there; a command that has ended by then is not held up.
    timer = Timer(0.02, signal.pthread_kill, [main_thread().ident, signal.SIGINT])
    timer.daemon = True
    timer.start()


def _drop_stdout() -> None:
    """Discard what is left in stdout's buffer, which Python would otherwise fail on again at exit."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
