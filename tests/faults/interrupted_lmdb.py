"""``create_lmdb`` that is killed, or whose disk fills, again and again: the LMDB of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import lmdb

from faults.cases import Broken
from faults.disturbed import PATIENCE, tracebacks
from faults.knocks import descendants, kill_all
from faults.small_disk import FILLER, LEFT, check_words, fill

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
        kill_all(process.pid)
        raise Broken(f"create_lmdb did not end within {PATIENCE} s") from None
    if tracebacks(said.read_text(errors="replace")):
        raise Broken(f"a traceback, see {said.name}")
    if code not in allowed:
        raise Broken(f"exit code {code}, see {said.name}")
    return code


def interrupted(images: Path, folder: Path, dice: random.Random) -> Counter[str]:
    """A case, with the class folders ``images``: killed, or stopped by a signal.

    Raises:
        Broken: a promise was not kept.
    """

    def knock(process: subprocess.Popen[str]) -> tuple[str, tuple[int, ...]]:
        how = dice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM))
        for pid in [process.pid, *(descendants(process.pid) if how == signal.SIGKILL else [])]:
            os.kill(pid, how)
        what = "killed" if how == signal.SIGKILL else "stopped by a signal"
        return f"create_lmdb {what}", (0, -how, 128 + how)

    return _through(images, folder, folder / "lmdb", dice, knock)


def on_full_disk(images: Path, folder: Path, disk: Path, dice: random.Random) -> Counter[str]:
    """A case: the LMDB is on a small ``disk``, which fills, and is cleared again.

    Raises:
        Broken: a promise was not kept.
    """
    filler = disk / FILLER

    def knock(process: subprocess.Popen[str]) -> tuple[str, tuple[int, ...]]:
        fill(filler, dice.choice(LEFT))
        return "create_lmdb on a full disk", (0, 1, 2)

    def clear(code: int, said: str) -> None:
        if code != 0:
            check_words(said)
        filler.unlink(missing_ok=True)

    return _through(images, folder, disk / "lmdb", dice, knock, clear)


def _through(
    images: Path,
    folder: Path,
    output: Path,
    dice: random.Random,
    knock: Callable[[subprocess.Popen[str]], tuple[str, tuple[int, ...]]],
    clear: Callable[[int, str], None] = lambda code, said: None,
) -> Counter[str]:
    """Start ``create_lmdb`` again and again, and ``knock`` each time; at last let it end, and compare.

    ``knock`` returns what is counted and the right exit codes; ``clear`` is called when it has ended.
    """
    done: Counter[str] = Counter()
    form = dice.choice((("--raw", "--size", "96"), ("--size", "96"), ("--raw", "--shorter-side", "64")))
    options = (*form, "--shuffle", str(dice.randrange(100)), "--keep")
    begun = time.monotonic()
    finish(
        create(images, folder / "whole", folder / "said_whole.txt", *options), folder / "said_whole.txt", 0
    )
    seconds = time.monotonic() - begun
    for number in range(dice.randint(1, MOST_TRIES)):
        said = folder / f"said_{number}.txt"
        process = create(images, output, said, *options)
        codes: tuple[int, ...] = (0,)
        time.sleep(dice.uniform(0.3, 1) * seconds)
        if process.poll() is None:
            name, codes = knock(process)
            done[name] += 1
        clear(finish(process, said, *codes), said.read_text(errors="replace"))
    said = folder / "said_last.txt"
    finish(create(images, output, said, *options), said, 0)
    if contents(output) != contents(folder / "whole"):
        raise Broken("the LMDB differs from one that was made without an interruption")
    left = sorted(path.name for path in output.parent.iterdir() if path.name.startswith((".", "lmdb.")))
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
