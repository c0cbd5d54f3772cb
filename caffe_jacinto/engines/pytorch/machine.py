"""What is kept for this machine from one training to the next: compiled kernels, and what was measured."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from pathlib import Path

import torch


def cache_folder() -> Path | None:
    """The user's cache folder of this project; None where it cannot be written to."""
    home = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(home) if home else Path("~/.cache").expanduser()) / "caffe_jacinto"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # there is no home, either
        return None
    return folder if os.access(folder, os.W_OK) else None


@cache
def identity() -> str:
    """Names the processor (model and instruction sets) and the version of PyTorch: ten hexadecimal digits.

    What is compiled or measured for one is not used on another; machines with the same ones can share a home.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return digest(platform.machine(), *kept, torch.__version__)


def digest(*parts: str) -> str:
    """Ten hexadecimal digits that stand for ``parts``."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]
