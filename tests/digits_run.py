"""Train the demo's recipe at a few iterations: real digits, a small network input, real Caffe."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from caffe_jacinto.create_lmdb import main as create_lmdb
from caffe_jacinto.data.digits import main as write_digits
from caffe_jacinto.recipes.load import BUILT_IN_FOLDER

STAGES = ("initial", "l1reg", "sparse", "finetune")
ITERATIONS = 6
WAIT_SECONDS = 60
PREFIX = "digits_jacintonet11"


def write_lmdbs(folder: Path) -> None:
    """``train_lmdb`` of 320 and ``val_lmdb`` of 50 real digits in ``folder``; images in ``digits``."""
    made = Path(_lmdbs_of_this_process().name)
    (folder / "digits").symlink_to(made / "digits")
    for name in ("train_lmdb", "val_lmdb"):
        shutil.copytree(made / name, folder / name)


@cache
def _lmdbs_of_this_process() -> TemporaryDirectory[str]:
    """Made once, by the code that users run; removed as the process ends."""
    made = TemporaryDirectory()
    folder = Path(made.name)
    write_digits(["--output", str(folder / "digits")])
    for name, count in (("train", 320), ("val", 50)):
        lines = (folder / f"digits/{name}.txt").read_text().splitlines()
        chosen = lines[:: len(lines) // count][:count]
        (folder / f"{name}.txt").write_text("\n".join(chosen) + "\n")
        create_lmdb(
            [
                *("--images", str(folder / "digits" / name), "--list", str(folder / f"{name}.txt")),
                *("--output", str(folder / f"{name}_lmdb"), "--size", "32", "--shuffle", "1"),
                *("--labels", str(folder / "digits/labels.txt")),
            ]
        )
    return made


def recipe_of(folder: Path, *stages: str) -> str:
    """A recipe file in ``folder`` with these stages of the demo's alone."""
    head, *sections = re.split(r"(?m)^(?=\[stages\.)", (BUILT_IN_FOLDER / "demo_digits.toml").read_text())
    chosen = [section for section in sections if section[8:].split("]")[0].split(".")[0] in stages]
    path = folder / f"{'_'.join(stages)}.toml"
    path.write_text(head + "".join(chosen))
    return f"./{path.name}"


def piped(path: Path) -> str:
    """A pipe with what the file holds, as bash's ``<(cat FILE)``: it can be read once."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(path.read_bytes())
    return f"/dev/fd/{reader}"


def quantizing(folder: Path, table: str = "") -> str:
    """A recipe file in ``folder`` of the stage initial, and a stage ``eight`` that quantizes it."""
    path = folder / recipe_of(folder, "initial")
    more = f'\n[stages.eight]\nstart = "initial"\n[stages.eight.quantize]\n{table}\n'
    path.write_text(path.read_text() + more)
    return f"./{path.name}"


def tiny(recipe: str = "demo_digits", only: tuple[str, ...] = STAGES, **stages: int) -> list[str]:
    """Arguments that make a recipe with the stages ``only`` tiny; ``stages`` gives some more iterations."""
    settings = [
        "training.batch_size=8",
        "training.reestimate_batches=2",
        "data.train_lmdb=train_lmdb",
        "data.val_lmdb=val_lmdb",
        "network.strides=[2,2,2,2,1]",
    ]
    if recipe == "demo_digits":
        settings.append("stages.quantize=")
    if "sparse" in only:
        schedule = {"start_iter": 1, "step_iter": 1, "step_factor": 0.2, "display": 2}
        settings += [f"stages.sparse.sparse.{name}={value}" for name, value in schedule.items()]
    for stage in only:
        values = {"max_iter": stages.get(stage, ITERATIONS), "snapshot": 2, "test_interval": 3, "display": 1}
        settings += [f"stages.{stage}.solver.{name}={value}" for name, value in values.items()]
    return [recipe, *(word for setting in settings for word in ("--set", setting))]


class Trainer:
    """`python -m caffe_jacinto.train`, as a user starts it, in ``folder``."""

    def __init__(self, caffe: Path | None, folder: Path, prefix: Sequence[str] = ()) -> None:
        """``caffe`` None: on PyTorch. ``prefix``: a program that starts the command."""
        self.folder, self._prefix = folder, prefix
        self._engine = ["--engine", "torch"] if caffe is None else ["--caffe", str(caffe)]

    def start(
        self, *arguments: str, program: Sequence[str] = ("-m", "caffe_jacinto.train"), **options: Any
    ) -> subprocess.Popen[str]:
        """``program``: what Python runs."""
        command = [*self._prefix, sys.executable, *program, *arguments]
        if "--status" not in arguments:
            command += self._engine
        # One thread each: the tests of one machine do not wait for each other's.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NO_COLOR": "1"}
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options},
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        """Its exit code and what it says."""
        process = self.start(*arguments)
        said, _ = process.communicate(timeout=300)
        return process.returncode, said

    @contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Started, and killed at the end together with the Caffe that it may have left."""
        process = self.start(*arguments)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def record(self, run: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / run / "run.json").read_text())
        return record

    def pid(self, run: str, stage: str) -> int:
        """Of the stage's command, as soon as run.json has it."""
        wait_for(lambda: self.record(run)["stages"][stage]["pid"], "process number")
        number: int = self.record(run)["stages"][stage]["pid"]
        return number

    def states(self, run: str) -> dict[str, str]:
        return {name: stage["state"] for name, stage in self.record(run)["stages"].items()}

    def log(self, run: str, stage: str) -> str:
        path = self.folder / run / stage / "run.log"
        return path.read_text(errors="replace") if path.exists() else ""


def wait_for(condition: Callable[[], object], what: str, seconds: float = WAIT_SECONDS) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, f"no {what} within {seconds:g} s"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def end(pid: int) -> None:
    """Kill a process that is no child of ours, and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_alive(pid), f"end of process {pid}")
