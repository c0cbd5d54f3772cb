"""When a training is disturbed: after a line of a stage's log, a new file in its folder, or its start."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

POLL_SECONDS = 0.001

AIMS = {
    "a snapshot": "Snapshotting ",
    "a threshold step": "Finding and applying sparsity",
    "recalibration": "Recalibrating the statistics",
    "a test": "Testing net",
}
"""What is aimed at, and the words of the log with which it begins."""

RANDOM, BEGINNING = "a random moment", "the start of the command"
NAMES = (RANDOM, BEGINNING, *AIMS)


class Moment(NamedTuple):
    """A moment of a command that trains."""

    name: str
    stage: str = ""
    """Empty: counted from the start of the command."""

    words: str = ""
    """Of the line in the stage's log; empty: its first."""

    nth: int = 1
    """Which of these lines, or of the new files in the folder."""

    of_files: bool = False
    """Whether a new file in the stage's folder is waited for, not a line."""

    delay: float = 0.0
    """Seconds from there."""


def choose(dice: random.Random, stage: str) -> Moment:
    """A moment of ``stage``, or of the command's start."""
    name = dice.choice([name for name in NAMES if name != "a threshold step" or stage == "sparse"])
    if stage == "test" and name != BEGINNING:
        name = RANDOM
    if name == BEGINNING:
        return Moment(name, delay=dice.uniform(0, 2.5))
    if name == RANDOM:
        return Moment(name, stage, delay=dice.uniform(0, 1 if stage == "test" else 3))
    # A snapshot of this size is written within milliseconds.
    delay = dice.uniform(0, 0.15 if name in ("a test", "recalibration") else 0.03)
    nth = dice.randint(1, {"a snapshot": 6, "a threshold step": 3, "a test": 3, "recalibration": 1}[name])
    if name == "a snapshot" and dice.random() < 0.5:
        return Moment(name, stage, nth=nth, of_files=True, delay=dice.uniform(0, 0.01))
    return Moment(name, stage, AIMS[name], nth, delay=delay)


class Watch:
    """Waits for a moment of a command that is about to start in the run folder ``run``."""

    def __init__(self, moment: Moment, run: Path, later: Sequence[str]) -> None:
        """``later``: the parts of the run after the moment's."""
        self._moment, self._folder = moment, run / moment.stage
        self._log = self._folder / "run.log"
        self._read = _size(self._log)
        self._later = {log: _size(log) for log in (run / part / "run.log" for part in later)}
        self._last = b""
        self._lines = 0
        self._files = self._names()
        self._new: set[str] = set()

    def wait(self, process: subprocess.Popen[str]) -> str | None:
        """Wait; the name of the moment that has come, or None if the command ends first.

        When the moment has been missed and a later part begins, that is a random moment.
        """
        while not self._reached():
            if process.poll() is not None:
                return None
            if any(_size(log) > size for log, size in self._later.items()):
                return RANDOM
            time.sleep(POLL_SECONDS)
        time.sleep(self._moment.delay)
        return self._moment.name if process.poll() is None else None

    def _reached(self) -> bool:
        moment = self._moment
        if not moment.stage:
            return True
        if moment.of_files:
            self._new |= self._names() - self._files
            return len(self._new) >= moment.nth
        try:
            with self._log.open("rb") as log:
                log.seek(self._read)
                data = log.read()
        except FileNotFoundError:
            return False
        self._read += len(data)
        if not moment.words:
            return bool(data)
        *lines, self._last = (self._last + data).split(b"\n")
        self._lines += sum(moment.words.encode() in line for line in lines)
        return self._lines >= moment.nth

    def _names(self) -> set[str]:
        """The snapshots, finished and in work, of the stage."""
        if not self._moment.of_files or not self._folder.is_dir():
            return set()
        endings = (".log", ".prototxt", ".sh")
        return {path.name for path in self._folder.iterdir() if not path.name.endswith(endings)}


def _size(log: Path) -> int:
    try:
        return log.stat().st_size
    except FileNotFoundError:
        return 0
