"""``create_lmdb`` that is killed, or whose disk fills, again and again: the LMDB of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import lmdb

from faults.cases import Broken
from faults.disturbed import PATIENCE, TRACEBACK
from faults.knocks import descendants

MOST_TRIES = 6


def create(images: Path, output: Path, said: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "caffe_jacinto.create_lmdb", "--images", str(images)]
    command += ["--output", str(output), *options]
    with said.open("w") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], said: Path, *allowed: int) -> int:
    """The exit code, one of ``allowed``.

    Raises:
        Broken: it hangs, ends otherwise, or gives a traceback.
    """
    try:
        code = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise Broken(f"create_lmdb did not end within {PATIENCE} s") from None
    if TRACEBACK in said.read_text(errors="replace"):
        raise Broken(f"a traceback, see {said.name}")
    if code not in allowed:
        raise Broken(f"exit code {code}, see {said.name}")
    return code


def interrupted(images: Path, folder: Path, dice: random.Random) -> Counter[str]:
    """A case, with the class folders ``images``: what was done.

    Raises:
        Broken: a promise was not kept.
    """
    done: Counter[str] = Counter()
    form = dice.choice((("--raw", "--size", "96"), ("--size", "96"), ("--raw", "--shorter-side", "64")))
    options = (*form, "--shuffle", str(dice.randrange(100)))
    begun = time.monotonic()
    finish(
        create(images, folder / "whole", folder / "said_whole.txt", *options), folder / "said_whole.txt", 0
    )
    seconds = time.monotonic() - begun
    output = folder / "lmdb"
    for number in range(dice.randint(1, MOST_TRIES)):
        said = folder / f"said_{number}.txt"
        process = create(images, output, said, *(options if not output.exists() else (*options, "--keep")))
        how = dice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM))
        time.sleep(dice.uniform(0.3, 1) * seconds)
        if process.poll() is None:
            for pid in [process.pid, *(descendants(process.pid) if how == signal.SIGKILL else [])]:
                os.kill(pid, how)
            done["create_lmdb killed" if how == signal.SIGKILL else "create_lmdb interrupted"] += 1
        finish(process, said, 0, -how, 128 + how)
    said = folder / "said_last.txt"
    finish(create(images, output, said, *options, "--keep"), said, 0)
    if contents(output) != contents(folder / "whole"):
        raise Broken("the LMDB differs from one that was made without an interruption")
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith((".", "lmdb.")))
    if left:
        raise Broken(f"left over beside the LMDB: {', '.join(left)}")
    done["LMDBs at their end, as the undisturbed one"] += 1
    return done


def contents(folder: Path) -> dict[str, object]:
    """The records in order, and the bytes of the other files."""
    names = [path for path in folder.iterdir() if path.name not in ("data.mdb", "lock.mdb")]
    files: dict[str, object] = {path.name: path.read_bytes() for path in names}
    with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return {**files, "records": list(transaction.cursor())}
