"""The commands that a user is told to go on with, as one types them."""

from __future__ import annotations

import shlex
from pathlib import Path


def resume_command(folder: Path) -> str:
    return shlex.join(["python", "-m", "caffe_jacinto.train", "--resume", str(folder)])


def report_command(folder: Path) -> str:
    return shlex.join(["python", "-m", "caffe_jacinto.report", str(folder)])
