"""How a user's mistake reaches the user: one line, exit code 2, no traceback."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

USER_ERROR = 2
"""Exit code for bad input, as argparse uses it."""

FAILED = 1
"""Exit code for work that was started and did not succeed."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""


class UserError(Exception):
    """Something the user can mend: what is wrong, where, and what to do, in one line.

    As text it is one line whatever it repeats of the user's: newlines, and other characters that are not
    printable, are shown as escapes.
    """

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


class RunFailed(UserError):  # noqa: N818 - a run that failed is what it is
    """Work that was started and failed for a reason outside this program (exit code 1)."""


class Parser(argparse.ArgumentParser):
    """Reads a command's arguments; a wrong one is a `UserError`, and no option may be shortened."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists all arguments")


def run_command(program: str, main: Callable[[Sequence[str]], int]) -> int:
    """Call ``main(sys.argv[1:])``; turn errors the user can mend into one line on stderr.

    Returns the exit code: main's own, 2 for a `UserError`, 1 for a `RunFailed` and for what the system
    refused (a full disk behind stdout, no permission), 130 after Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path that the terminal's encoding cannot show, or that is no Unicode, must not end the command.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:])
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return FAILED if isinstance(error, RunFailed) else USER_ERROR
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) has gone.
        _drop_stdout()
        return FAILED
    except OSError as error:
        print(f"{program}: error: {UserError(error)}", file=sys.stderr)
        _drop_stdout()
        return FAILED


def _drop_stdout() -> None:
    """What is left in stdout's buffer has nowhere to go; Python would fail on it again at its end."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
