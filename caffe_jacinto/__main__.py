"""All commands under one name: ``caffe-jacinto report logs/`` is ``python -m caffe_jacinto.report logs/``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from caffe_jacinto import __doc__ as purpose
from caffe_jacinto import __version__
from caffe_jacinto.common.errors import UserError, run_command
from caffe_jacinto.common.text import did_you_mean

PROGRAM = "caffe-jacinto"
COMMANDS = {
    "create_lmdb": "make LMDBs of images in ImageNet's layout, and check LMDBs",
    "build_net": "write a network's train, val, deploy and solver prototxt; show and draw networks",
    "train": "train a recipe's stages one after the other, then test the result",
    "report": "read Caffe's logs and print the result tables",
    "weights": "show, compare, convert, sparsify and export weight files",
    "classify": "classify images with a trained network",
    "quantize": "quantize a trained network to few bits, test it, and write it for a processor",
}


def main(argv: Sequence[str]) -> int:
    """List the commands, or print the version."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    raise UserError(f"{argv[0]}: not a command; {did_you_mean(_module(argv[0]), COMMANDS)}")


def script() -> int:
    """Run the command that the first argument names, or `main`; returns the exit code."""
    name = _module(sys.argv[1]) if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        return run_command(PROGRAM, main)
    sys.argv[:2] = [f"{PROGRAM} {name}"]  # what usage and errors call the program
    return run_command(sys.argv[0], lambda argv: import_module(f"caffe_jacinto.{name}").main(argv))


def _module(name: str) -> str:
    """A command may be written with dashes: ``build-net``."""
    return name.replace("-", "_") if not name.startswith("-") else name


def _usage() -> str:
    lines = [
        f"usage: {PROGRAM} COMMAND ...",
        "",
        purpose or "",
        "",
        *(f"  {name:<12} {line}" for name, line in COMMANDS.items()),
        "",
        f"{PROGRAM} COMMAND --help lists a command's arguments. --version prints the version.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(script())
