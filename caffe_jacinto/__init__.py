"""Train low-complexity sparse image classifiers as Caffe files."""

import os
import signal
import sys

__version__ = "0.1.0"


def _command_starts() -> bool:
    """Whether this is imported because a command of the package starts, not by another program."""
    name = os.path.basename(sys.argv[0] if sys.argv else "")  # noqa: PTH119
    if name != "-m":  # which stands there until Python has found the module
        return name in ("caffe-jacinto", "caffe-torch")
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv[:-1] else ""
    return module.split(".")[0] == __name__


if _command_starts():
    # Its imports take up to seconds. Until `common.errors.run_command` handles Ctrl-C, that just ends the
    # program, without a traceback; where it is ignored, as behind an &, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # They may fail, too.
    from caffe_jacinto.common.dependencies import explain_at_exit

    explain_at_exit()
