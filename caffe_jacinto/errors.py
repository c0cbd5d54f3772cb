"""How a user's mistake reaches the user: one line, exit code 2, no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

USER_ERROR = 2
"""Exit code for bad input, as argparse uses it."""

FAILED = 1
"""Exit code for work that was started and did not succeed."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""


class UserError(Exception):
    """Something the user can mend: what is wrong, where, and what to do, in one line."""


class RunFailed(UserError):
    """Work that was started and failed for a reason outside this program (exit code 1)."""


def run_command(program: str, main: Callable[[Sequence[str]], int]) -> int:
    """Call ``main(sys.argv[1:])``; turn errors the user can mend into one line on stderr.

    Returns the exit code: main's own, 2 for a `UserError`, 1 for a `RunFailed`, 130 after Ctrl-C.
    """
    try:
        return main(sys.argv[1:])
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return FAILED if isinstance(error, RunFailed) else USER_ERROR
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; what is left of stdout has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
