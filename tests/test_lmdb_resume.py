"""Never half an LMDB: after any interruption the same command continues, to the same records."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ilsvrc import jpeg, train_images, write_folders, write_train
from lmdb_records import create, mistake, names_in, records

from caffe_jacinto.common.errors import RunFailed
from caffe_jacinto.data import create as convert_module
from caffe_jacinto.data import lmdb_writer
from caffe_jacinto.data.encode import image_record
from caffe_jacinto.data.lmdb_writer import new_lmdb

CREATE = (sys.executable, "-m", "caffe_jacinto.create_lmdb")

SMALL_BATCHES = (
    "import sys; from caffe_jacinto.data import lmdb_writer\n"
    "lmdb_writer.BATCH_BYTES = 8000\n"
    "from caffe_jacinto.create_lmdb import main\n"
    "from caffe_jacinto.common.errors import run_command\n"
    "sys.exit(run_command('create_lmdb', main))\n"
)
"""create_lmdb with a transaction every few images, so that a short run has many of them."""


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_writer, "BATCH_BYTES", 8000)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """4 classes of 30 images, and bad ones among them."""
    folder = write_folders(tmp_path / "train", train_images(30))
    for number, name in enumerate(sorted(names_in(folder))):
        (folder / name / f"bad {number}.JPEG").write_bytes(b"" if number % 2 else b"no image")
    return folder


class StopError(Exception):
    """Stands for whatever may end a process in the middle."""


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Make the conversion of images fail after so many of them; None: not any more.

    One thread works on them, so that those before it are stored, however busy the machine is.
    """
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})

    def set_limit(limit: int | None) -> None:
        done = 0

        def record(path: bytes, content: bytes, label: int, form: object) -> bytes:
            nonlocal done
            done += 1
            if limit is not None and done > limit:
                raise StopError
            return image_record(path, content, label, form)  # type: ignore[arg-type]

        monkeypatch.setattr(convert_module, "image_record", record)

    return set_limit


def everything_in(lmdb_folder: Path) -> dict[str, object]:
    """All that the data layer and a user see of an LMDB."""
    texts = {p.name: p.read_bytes() for p in lmdb_folder.iterdir() if p.name not in ("data.mdb", "lock.mdb")}
    return {**texts, "records": list(records(lmdb_folder).items())}


def test_going_on_gives_the_records_of_an_uninterrupted_run(
    images: Path,
    tmp_path: Path,
    small_batches: None,
    stop_after: Callable[[int | None], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["--images", images, "--size", 32, "--output"]
    create(*command, tmp_path / "whole")
    for limit in (30, 30, 30):
        stop_after(limit)
        with pytest.raises(StopError):
            create(*command, tmp_path / "o")
        assert not (tmp_path / "o").exists()
    stop_after(None)
    capsys.readouterr()
    create(*command, tmp_path / "o")
    told = capsys.readouterr().out
    assert "continuing after an interruption: " in told and " of 124 images were done" in told
    assert everything_in(tmp_path / "o") == everything_in(tmp_path / "whole")
    assert len((tmp_path / "o" / "skipped.txt").read_text().splitlines()) == 4
    assert names_in(tmp_path) == ["o", "train", "whole"]


def test_what_is_there_is_not_done_again(
    images: Path, tmp_path: Path, small_batches: None, stop_after: Callable[[int | None], None]
) -> None:
    command = ["--images", images, "--size", 32, "--output", tmp_path / "o", "--workers", 1]
    stop_after(100)
    with pytest.raises(StopError):
        create(*command)
    stop_after(60)  # Enough for what is left, not for all.
    create(*command)
    assert len(records(tmp_path / "o")) == 120


def test_an_unfinished_lmdb_of_another_making_is_not_lost(
    images: Path, tmp_path: Path, small_batches: None, stop_after: Callable[[int | None], None]
) -> None:
    command = ["--images", images, "--output", tmp_path / "o"]
    stop_after(60)
    with pytest.raises(StopError):
        create(*command, "--size", 32)
    stop_after(None)
    before = (tmp_path / ".o.partial" / "lmdb" / "data.mdb").read_bytes()
    message = mistake([*command, "--size", 48])
    assert (
        "is an unfinished LMDB that was made differently (form: 32x32 colour, now 48x48 colour): start"
        in message
    )
    assert "order: shuffled with seed 33, now shuffled with seed 4" in mistake(
        [*command, "--size", 32, "--shuffle", 4]
    )
    (images / "n01440764" / "new.JPEG").write_bytes(jpeg(5))
    assert "listing: " in mistake([*command, "--size", 32])
    assert (tmp_path / ".o.partial" / "lmdb" / "data.mdb").read_bytes() == before
    create(*command, "--size", 48, "--restart")
    assert len(records(tmp_path / "o")) == 121
    assert names_in(tmp_path) == ["o", "train"]


def test_force_replaces_only_when_the_new_one_is_complete_and_goes_on_too(
    images: Path, tmp_path: Path, small_batches: None, stop_after: Callable[[int | None], None]
) -> None:
    create("--images", images, "--output", tmp_path / "o", "--size", 16)
    before = everything_in(tmp_path / "o")
    command = ["--images", images, "--output", tmp_path / "o", "--size", 32, "--force", "--workers", 1]
    stop_after(100)
    with pytest.raises(StopError):
        create(*command)
    assert everything_in(tmp_path / "o") == before
    stop_after(60)
    create(*command)
    assert everything_in(tmp_path / "o") != before


def test_a_damaged_part_is_found(
    images: Path, tmp_path: Path, small_batches: None, stop_after: Callable[[int | None], None]
) -> None:
    """One byte of one record is another one, as on a disk that fails."""
    command = ["--images", images, "--output", tmp_path / "o", "--size", 32]
    stop_after(100)
    with pytest.raises(StopError):
        create(*command)
    stop_after(None)
    data = tmp_path / ".o.partial" / "lmdb" / "data.mdb"
    content = bytearray(data.read_bytes())
    place = list(records(data.parent).values())[3]
    content[content.index(place) + 50] ^= 1
    data.write_bytes(content)
    assert "is damaged (records 1 to " in mistake(command)
    data.write_bytes(content[: len(content) // 2])
    assert "is damaged (it is cut off)" in mistake(command)
    create(*command, "--restart")
    assert len(records(tmp_path / "o")) == 120


def test_a_torn_journal(
    images: Path, tmp_path: Path, small_batches: None, stop_after: Callable[[int | None], None]
) -> None:
    """A power cut may leave half a line; and a line whose transaction never came to the disk."""
    command = ["--images", images, "--output", tmp_path / "o", "--size", 32]
    create(*command[:2], "--output", tmp_path / "whole", "--size", 32)
    stop_after(100)
    with pytest.raises(StopError):
        create(*command)
    stop_after(None)
    with (tmp_path / ".o.partial" / "journal").open("a") as journal:
        journal.write('{"skipped": [120, "x", "y"]}\n{"end": 123, "records": 119, "crc": 5}\n{"end": 12')
    create(*command)
    assert everything_in(tmp_path / "o") == everything_in(tmp_path / "whole")


# ---------------------------------------------------------------------------------- a full disk


def test_a_full_disk_is_said_and_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_batches: None
) -> None:
    """The real thing: a limit on the size of files makes LMDB's write fail as a full disk does."""
    images = write_folders(tmp_path / "train", train_images(100))
    command = ["--images", str(images), "--size", "32", "--output"]
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))\n"
    done = subprocess.run(
        [sys.executable, "-c", limit + SMALL_BATCHES, *command, tmp_path / "o"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "could not be written: mdb_" in done.stderr and "Traceback" not in done.stderr
    assert names_in(tmp_path) == [".o.partial", "train"]
    create(*command, tmp_path / "o")
    create(*command, tmp_path / "whole")
    assert everything_in(tmp_path / "o") == everything_in(tmp_path / "whole")

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with (
        pytest.raises(RunFailed, match=r"is full \(1 kB left\).*start the same command again to continue"),
        new_lmdb(tmp_path / "p"),
    ):
        raise OSError("mdb_txn_commit: Input/output error")
    assert names_in(tmp_path) == ["o", "train", "whole"]


# ---------------------------------------------------------------------------------- killed


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_train(tmp_path, train_images(150))


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SMALL_BATCHES, *map(os.fspath, map(str, arguments))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_work(partial: Path, process: subprocess.Popen[str]) -> None:
    """Wait until the process has stored something."""
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        journal = partial / "journal"
        if journal.exists() and journal.read_bytes().count(b"records") > 1:
            return
        time.sleep(0.001)


@pytest.mark.caffe  # Needs no Caffe, but seconds.
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_in_the_middle(archive: Path, tmp_path: Path, kind: signal.Signals) -> None:
    command = ["--images", archive, "--size", 64, "--output", tmp_path / "o"]
    process = start(*command)
    wait_for_work(tmp_path / ".o.partial", process)
    process.send_signal(kind)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[kind]
    assert "Traceback" not in errors
    assert not (tmp_path / "o").exists()
    going_on = start(*command)
    told, errors = going_on.communicate(timeout=60)
    assert going_on.returncode == 0, errors
    assert "continuing after an interruption" in told
    create("--images", archive, "--size", 64, "--output", tmp_path / "whole")
    assert everything_in(tmp_path / "o") == everything_in(tmp_path / "whole")
    assert names_in(tmp_path) == [archive.name, "o", "whole"]


def kill_after(process: subprocess.Popen[str], journal: Path, seconds: float) -> bool:
    """Kill the process so long after it begins to store images; whether it was still there."""
    before = journal.stat().st_size if journal.exists() else 0
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > before):
        time.sleep(0.001)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.caffe  # Needs no Caffe, but half a minute.
def test_random_kills(archive: Path, tmp_path: Path) -> None:
    """Killed at random moments, at the start and at the end too, and gone on with until complete.

    CAFFE_JACINTO_KILLS sets the number of kills, in as many LMDBs as they need.
    """
    wanted, killed, made = int(os.environ.get("CAFFE_JACINTO_KILLS", "6")), 0, 0
    chooser = random.Random(int(os.environ.get("CAFFE_JACINTO_KILL_SEED", "1")))
    command = ["--images", archive, "--size", 64, "--output"]
    create(*command, tmp_path / "whole")
    whole = everything_in(tmp_path / "whole")
    while killed < wanted:
        output = tmp_path / f"o{made}"
        process = start(*command, output)
        journal = tmp_path / f".o{made}.partial" / "journal"
        killed += kill_after(process, journal, chooser.uniform(0, 0.1))
        if output.exists():
            assert everything_in(output) == whole
            made += 1
        else:
            assert process.returncode == -signal.SIGKILL
    last = tmp_path / f"o{made}"
    create(*command, last)
    assert everything_in(last) == whole
    print(f"{killed} kills, {made + 1} LMDBs")


# ---------------------------------------------------------------------------------- shards


def test_two_processes_make_one_lmdb_together(archive: Path, tmp_path: Path) -> None:
    output = tmp_path / "o"
    command = ["--images", archive, "--size", 32, "--output", output]
    both = [start(*command, "--shard", f"{number}/2") for number in (1, 2)]
    for process in both:
        told, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "when all 2 shards are there: python -m caffe_jacinto.create_lmdb --join --output" in told
    create("--join", "--output", output)
    create(*command[:-1], tmp_path / "whole")
    assert everything_in(output) == everything_in(tmp_path / "whole")
    assert names_in(tmp_path) == [archive.name, "o", "o.shard-1-of-2", "o.shard-2-of-2", "whole"]


def test_shards_that_do_not_fit_together(images: Path, tmp_path: Path, small_batches: None) -> None:
    output = tmp_path / "o"
    assert "there are no shards o.shard-1-of-N" in mistake(["--join", "--output", output])
    command = ["--images", images, "--size", 32, "--output", output, "--shard"]
    create(*command, "1/3")
    create(*command, "3/3")
    message = mistake(["--join", "--output", output])
    assert message == f"{output}.shard-2-of-3 is missing: make it with --shard 2/3"
    create(*command, "2/3", "--quality", 50)
    message = mistake(["--join", "--output", output])
    assert "o.shard-2-of-3 was made differently from" in message and "(form: 32x32 colour JPEG" in message
    create(*command, "2/3", "--force")
    create("--join", "--output", output)
    create(*command[:4], "--output", tmp_path / "whole")
    assert everything_in(output) == everything_in(tmp_path / "whole")
    assert json.loads((output / "made_from.json").read_text())["order"] == "shuffled with seed 33"
    assert "--images is for making an LMDB from images" in mistake(["--join", *command[:6]])
    assert "'3/2' is not a shard" in mistake([*command, "3/2"])
    assert "--shard 1 of 500 holds none of 124 images" in mistake([*command, "1/500"])


def test_an_interrupted_joining_goes_on(
    images: Path, tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "o"
    for number in (1, 2):
        create("--images", images, "--size", 32, "--output", output, "--shard", f"{number}/2")
    put = lmdb_writer.LmdbWriter.put
    stored = 0

    def put_some(writer: lmdb_writer.LmdbWriter, key: bytes, record: bytes) -> None:
        nonlocal stored
        stored += 1
        if stored == 90:
            raise StopError
        put(writer, key, record)

    monkeypatch.setattr(lmdb_writer.LmdbWriter, "put", put_some)
    with pytest.raises(StopError):
        create("--join", "--output", output)
    create("--join", "--output", output)
    assert stored < 90 + 120
    create("--images", images, "--size", 32, "--output", tmp_path / "whole")
    assert everything_in(output) == everything_in(tmp_path / "whole")


# ---------------------------------------------------------------------------------- too many bad images


def test_more_bad_images_than_allowed_are_an_error_with_all_listed(images: Path, tmp_path: Path) -> None:
    command = ["--images", images, "--size", 32, "--output", tmp_path / "o", "--no-shuffle"]
    message = mistake([*command, "--max-bad", 2])
    assert "3 images of the first" in message and "cannot be read, more than --max-bad 2" in message
    assert not (tmp_path / "o").exists()
    create(*command, "--max-bad", "4%")
    assert len(records(tmp_path / "o")) == 120
    assert "'5%%' is neither a number of images nor a percentage" in mistake([*command, "--max-bad", "5%%"])
