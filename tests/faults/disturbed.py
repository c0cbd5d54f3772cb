"""A training that is disturbed: its commands as a user gives them, and what each of them may say."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import digits_run
import numpy as np
from digits_run import ITERATIONS, PREFIX, Trainer, tiny

from caffe_jacinto.caffemodel.storage import read_weights
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.pytorch.engine import NOTHING_DONE
from caffe_jacinto.pruning.pruner import MASKS_SUFFIX, load_masks
from caffe_jacinto.runs.folder import TEST
from caffe_jacinto.runs.lock import is_held
from faults.cases import Broken
from faults.knocks import kill_all

STAGES = {**dict.fromkeys(digits_run.STAGES, ITERATIONS), "sparse": 8}
"""The stages of the demo's recipe, and their iterations here; a snapshot every 2, a test every 3."""

RECIPE = tiny(sparse=STAGES["sparse"])

PARTS = (*STAGES, TEST)

PATIENCE = 300
"""Seconds after which a command hangs."""

TRACEBACK = "Traceback (most recent call last)"

HOW_TO_GO_ON = ("--resume", NOTHING_DONE)

KILLED = (-signal.SIGKILL,)
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)
"""The last three: before the command has begun to handle signals."""
FINISHED, FAILED, REFUSED = 0, 1, 2


def tracebacks(text: str) -> list[str]:
    """The tracebacks in ``text``, except those of a Ctrl-C while Python itself starts."""
    found = []
    for part in text.split(TRACEBACK)[1:]:
        frames, _, error = re.match(r":?((?:\n[ \t].*)*)(\n?)(.*)", part).groups()  # type: ignore[union-attr]
        if "/caffe_jacinto/" in frames or not error.startswith("KeyboardInterrupt"):
            found.append(frames + error)
    return found


def final_weights(run: Path, stage: str) -> Path:
    return run / stage / f"{PREFIX}_iter_{STAGES[stage]}.caffemodel"


class Command(NamedTuple):
    """A command that was started, and the file that has what it says."""

    process: subprocess.Popen[str]
    said: Path

    def finish(self, *allowed: int) -> tuple[int, str]:
        """Wait for it; its exit code, one of ``allowed``, and what it said.

        Raises:
            Broken: it hangs, ends otherwise, gives a traceback, or fails without saying how to go on.
        """
        where = f"see {self.said.name}"
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            kill_all(self.process.pid)
            raise Broken(f"a command did not end within {PATIENCE} s, {where}") from None
        said = self.said.read_text(errors="replace")
        if tracebacks(said):
            raise Broken(f"a traceback, {where}")
        if TRACEBACK in said:
            code = -signal.SIGINT  # that Python reports itself, with any exit code
        if code not in allowed:
            raise Broken(f"exit code {code}, not {' or '.join(map(str, allowed))}, {where}")
        if code == FAILED and not any(words in said for words in HOW_TO_GO_ON):
            raise Broken(f"exit code {code} without how to go on, {where}")
        if code == REFUSED and ": error: " not in said:
            raise Broken(f"exit code {code} without an error line, {where}")
        return code, said


class DisturbedRun:
    """A run of all stages in ``folder``, on real digits."""

    def __init__(self, folder: Path, caffe: Path | None, place: str = "run") -> None:
        """``folder`` has the LMDBs; ``caffe`` None: on PyTorch. ``place`` is the run folder in ``folder``."""
        self.trainer = Trainer(caffe, folder)
        self.on_pytorch = caffe is None
        self.place, self.folder = place, folder / place
        self.done: Counter[str] = Counter()
        self._commands = 0
        self._frozen: list[tuple[str, str, np.ndarray]] = []
        """Zeros that a snapshot which training went on from had frozen: stage, layer, and where."""

    def start(self) -> Command:
        """Start the run, or resume it; as a user does who is told nothing but what is there."""
        begun = (self.folder / "run.json").exists()
        arguments = (
            ["--resume", self.place] if begun else [*tiny(sparse=STAGES["sparse"]), "--output", self.place]
        )
        return self._command(*arguments)

    def go_on(self) -> Command:
        """``--resume``, whatever is there."""
        return self._command("--resume", self.place)

    def _command(self, *arguments: str) -> Command:
        self._commands += 1
        path = self.trainer.folder / f"said_{self._commands}.txt"
        with path.open("w") as said:
            return Command(self.trainer.start(*arguments, stdout=said), path)

    def resumed_ok(self) -> str:
        """Go on, undisturbed, to the end of the run; what it said."""
        self.wait_for_engine()
        masks = self.before()
        _, said = self.start().finish(FINISHED)
        self.remember_frozen(masks, said)
        return said

    def wait_for_engine(self) -> None:
        """If an engine has outlived its driver, do what the refusal of ``--resume`` says."""
        if not is_held(self.folder):
            return
        # It may end by itself at any moment: then this resume trains.
        masks = self.before()
        command = self.go_on()
        code, said = command.finish(FINISHED, REFUSED)
        self.remember_frozen(masks, said)
        if code == FINISHED:
            return
        named = re.search(r"process (\d+) \(.*kill -INT \1\b", said)
        if named is None:
            raise Broken(f"refused without the process to stop, see {command.said.name}")
        self.done["resume refused while a training process was left"] += 1
        os.kill(int(named[1]), signal.SIGINT)
        give_up = time.monotonic() + PATIENCE
        while is_held(self.folder):
            if time.monotonic() > give_up:
                raise Broken(f"process {named[1]} did not stop at SIGINT within {PATIENCE} s")
            time.sleep(0.05)

    # The zeros that must not move

    def before(self) -> dict[tuple[str, int], dict[str, np.ndarray]]:
        """What is frozen in each complete snapshot now, for `remember_frozen`."""
        found = {}
        for file in self.folder.glob(f"*/*{MASKS_SUFFIX}"):
            iteration = int(file.name.removesuffix(MASKS_SUFFIX).rsplit("_", 1)[1])
            weights = file.with_name(file.name.replace(MASKS_SUFFIX, ".caffemodel"))
            try:
                blobs = {name: blobs[0] for name, blobs in read_weights(weights).items() if blobs}
                found[file.parent.name, iteration] = load_masks(weights, blobs)[0]
            except UserError:
                continue  # not complete: nothing can go on from it
        return found

    def remember_frozen(self, masks: dict[tuple[str, int], dict[str, np.ndarray]], said: str) -> None:
        """Of the snapshots in ``masks``, those that a command went on from, as it ``said``."""
        for stage, iteration in re.findall(r"stage \d/\d (\w+): .*resumes at iteration ([\d,]+)", said):
            for layer, mask in masks.get((stage, int(iteration.replace(",", ""))), {}).items():
                self._frozen.append((stage, layer, mask == 0))

    def check_frozen(self) -> None:
        """The zeros that were frozen when it was disturbed are zero at the end of that stage and of the run.

        Raises:
            Broken: one has moved.
        """
        for stage in ("sparse", "finetune"):
            weights = read_weights(final_weights(self.folder, stage))
            for frozen_in, layer, zeros in self._frozen:
                if stage == "finetune" or frozen_in == stage:
                    moved = int(np.count_nonzero(weights[layer][0][zeros]))
                    if moved:
                        raise Broken(
                            f"{moved} zeros of {layer}, frozen in {frozen_in}, moved by {stage}'s end"
                        )
        self.done["frozen zeros followed over a resume"] += sum(
            int(zeros.sum()) for *_, zeros in self._frozen
        )

    def is_under_way(self) -> bool:
        """Whether it has a readable record and is not finished."""
        try:
            states = [stage["state"] for stage in self._record()["stages"].values()]
        except (OSError, ValueError):
            return False
        return any(state != "finished" for state in states)

    def check_commands(self) -> None:
        """After the end: the report and the status, the states, the logs, and nothing left over.

        Raises:
            Broken: one of them is not as it should be.
        """
        states = {name: stage["state"] for name, stage in self._record()["stages"].items()}
        if states != dict.fromkeys(PARTS, "finished"):
            raise Broken(f"exit code 0, but run.json has {states}")
        for log in self.folder.glob("*/run.log"):
            if tracebacks(log.read_text(errors="replace")):
                raise Broken(f"a traceback in {log.relative_to(self.folder)}")
        left = [str(path.relative_to(self.folder)) for path in self.folder.rglob(".*")]
        if left:
            raise Broken(f"temporary files are left: {', '.join(left)}")
        if is_held(self.folder):
            raise Broken("the lock is still held after the end")
        self._command("--status", self.place).finish(FINISHED)

    def _record(self) -> dict[str, dict[str, dict[str, str]]]:
        content: dict[str, dict[str, dict[str, str]]] = json.loads((self.folder / "run.json").read_text())
        return content
