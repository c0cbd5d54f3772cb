"""Hostile logs, archives and images: each is reported, stored, or refused in a line, in little time."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from fuzzing import fuzz

from caffe_jacinto import create_lmdb, report, train
from caffe_jacinto.common.errors import run_command
from faults.cases import Broken
from faults.hostile_archives import hostile_archive
from faults.hostile_images import hostile_folder, hostile_list
from faults.hostile_logs import hostile_log

SECONDS = 10.0
"""Of inputs in one case."""

MOST_SECONDS = 30.0
"""For one input, by the clock."""

CODES = (0, 1, 2)


class TooSlowError(BaseException):
    """One input took more than `MOST_SECONDS`."""


def call(program: str, main: Callable[[Sequence[str]], int], *arguments: str) -> tuple[int, str]:
    """A command as its user starts it, but in this process: its exit code, and what it said.

    Raises:
        Broken: it gives a traceback, another exit code, or takes too long.
    """
    words = f"{program} {' '.join(arguments)}"
    before, sys.argv = sys.argv, [program, *arguments]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:  # commands ask for the stream's number
        try:
            with _alarm(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = run_command(program, main)
        except SystemExit as error:  # argparse
            code = error.code if isinstance(error.code, int) else 1
        except TooSlowError:
            raise Broken(f"{words}: takes more than {MOST_SECONDS:g} s") from None
        except BaseException as error:
            line = traceback.format_exception_only(error)[-1].strip()
            raise Broken(f"{words}: a traceback: {line[:500]}") from error
        finally:
            sys.argv = before
        said.seek(0)
        text = said.read()
    if code not in CODES:
        raise Broken(f"{words}: exit code {code}")
    if code == 2 and "error: " not in text:
        raise Broken(f"{words}: exit code 2 without an error line")
    return code, text


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    signal.signal(signal.SIGALRM, _too_slow)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlowError


def _rounds(folder: Path) -> Iterator[Path]:
    """Folders for inputs until the time is over; the last one stays if something is broken."""
    end = time.monotonic() + SECONDS
    number = 0
    while time.monotonic() < end:
        number += 1
        place = folder / f"input_{number}"
        place.mkdir()
        yield place
        shutil.rmtree(place)


def logs(folder: Path, run: Path, dice: random.Random) -> Counter[str]:
    """Logs made of those of the finished ``run``, as files and as the log of its stage.

    Raises:
        Broken: a promise was not kept.
    """
    sound = [log.read_bytes() for log in sorted(run.glob("*/run.log"))]
    done: Counter[str] = Counter()
    for place in _rounds(folder):
        content = hostile_log(sound, dice)
        log = place / "run.log"
        log.write_bytes(content)
        call("report", report.main, str(log), "--format", dice.choice(("table", "markdown", "csv", "json")))
        stage = place / "run" / dice.choice(("initial", "sparse"))
        stage.mkdir(parents=True)
        shutil.copy(run / "run.json", place / "run")
        (stage / "run.log").write_bytes(content)
        (stage / "val.prototxt").write_bytes((run / stage.name / "val.prototxt").read_bytes())
        call("train", train.main, "--status", str(place / "run"))
        done["hostile logs"] += 1
    return done


def archives(folder: Path, dice: random.Random) -> Counter[str]:
    """Tar archives of class folders, of a tar for each class, and of validation images.

    Raises:
        Broken: a promise was not kept.
    """
    done: Counter[str] = Counter()
    for place in _rounds(folder):
        archive, options = hostile_archive(place, dice)
        done[f"hostile archive {_make_lmdb(place, '--images', str(archive), *options)}"] += 1
    return done


def images(folder: Path, dice: random.Random) -> Counter[str]:
    """Folders of odd and damaged images, and lists of them.

    Raises:
        Broken: a promise was not kept.
    """
    done: Counter[str] = Counter()
    forms = ((), ("--raw",), ("--gray",), ("--fast",), ("--size", "original"), ("--shorter-side", "24"))
    for place in _rounds(folder):
        source = hostile_folder(place / "images", dice)
        options = [*dice.choice(forms), "--max-bad", dice.choice(("0", "1000"))]
        if dice.random() < 0.5:
            (place / "list.txt").write_bytes(hostile_list(source, dice))
            options += ["--list", str(place / "list.txt")]
        done[f"hostile images {_make_lmdb(place, '--images', str(source), *options)}"] += 1
    return done


def _make_lmdb(place: Path, *arguments: str) -> str:
    """An LMDB is made, whole, or it is refused and there is none; which of the two."""
    output = place / "lmdb"
    size = () if {"--size", "--shorter-side"} & set(arguments) else ("--size", "24")
    code, _ = call("create_lmdb", create_lmdb.main, "--output", str(output), *size, *arguments)
    if (code == 0) != output.exists():
        raise Broken(f"create_lmdb {' '.join(arguments)}: exit code {code}, LMDB there: {output.exists()}")
    if code == 0:
        # Images of several sizes are a problem that it names, with exit code 1.
        call("create_lmdb", create_lmdb.main, "--verify", str(output))
    return "refused" if code else "stored"


def files(folder: Path, dice: random.Random) -> Counter[str]:
    """Damaged weight files and prototxts, with the limits of tests/fuzzing.py.

    Raises:
        Broken: a promise was not kept.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        count, trouble, content = fuzz(1_000_000, SECONDS, dice.randrange(1 << 30))
    if trouble is not None:
        (folder / "damaged").write_bytes(content)
        raise Broken(f"a damaged weight file or prototxt: {trouble}")
    return Counter({"damaged weight files and prototxts": count})
