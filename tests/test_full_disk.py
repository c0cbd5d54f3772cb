"""A disk that is too small, or fills while a stage trains: what is said, and that the run goes on."""

from __future__ import annotations

import errno
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from digits_run import ITERATIONS, PREFIX, Trainer, recipe_of, tiny, wait_for, write_lmdbs
from small_disk import SmallDisk, small_disk

from caffe_jacinto.common.disk import place_of, size
from caffe_jacinto.common.errors import RunFailed
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.engines.contract import Engine
from caffe_jacinto.runs.start import full_disks_named

MEGABYTE = 1 << 20


@pytest.fixture(params=["bvlc", "torch"])
def caffe(request: pytest.FixtureRequest) -> Path | None:
    """The executable of stock Caffe; None: PyTorch."""
    if request.param == "torch":
        pytest.importorskip("torch")
        return None
    engine: Engine = request.getfixturevalue("caffe_engine")
    return engine.info.executable


def run_on(disk: SmallDisk, caffe: Path | None, folder: Path, *stages: str) -> tuple[Trainer, list[str]]:
    """A trainer that sees the disk, and the arguments of a run on it that keeps one snapshot."""
    write_lmdbs(folder)
    recipe = recipe_of(folder, *stages)
    return Trainer(caffe, folder, disk.prefix), [
        *tiny(recipe, stages, **dict.fromkeys(stages, 16)),
        *("--keep", "1", "--output", "disk/run"),
    ]


@pytest.mark.caffe
def test_a_disk_that_will_not_hold_the_snapshots_is_refused(tmp_path: Path, caffe: Path | None) -> None:
    with small_disk(tmp_path / "disk", 40 * MEGABYTE) as disk:
        trainer, arguments = run_on(disk, caffe, tmp_path, "initial")
        code, said = trainer.run(*arguments)
        assert code == 2, said
        message = rf"not enough space on the disk {tmp_path}/disk: the snapshots need about \d+ MB more"
        assert re.search(message, said), said
        assert re.search(r"and 4\d MB are free; free \d+ MB, or put the run elsewhere with --output", said)
        assert not list(disk.seen_from_here.iterdir())


@pytest.mark.caffe
@pytest.mark.parametrize(("stage", "left"), [("initial", 0), ("sparse", 8 * MEGABYTE)])
def test_a_disk_that_fills_while_a_stage_trains(
    tmp_path: Path, caffe: Path | None, stage: str, left: int
) -> None:
    with small_disk(tmp_path / "disk", 100 * MEGABYTE) as disk:
        trainer, arguments = run_on(disk, caffe, tmp_path, stage)
        arguments += ["--set", f"stages.{stage}.solver.snapshot=4", "--set", f"stages.{stage}.start="]
        log = disk.seen_from_here / "run" / stage / "run.log"
        with trainer.running(*arguments) as process:
            wait_for(lambda: log.exists() and "Iteration 5" in log.read_text(), "iteration 5")
            disk.fill(left)
            said, _ = process.communicate(timeout=120)
        assert process.returncode == 1, said
        message = (
            rf"the disk mounted at {tmp_path}/disk \(folder {tmp_path}/disk/run\) is full: \d+ \wB are free,"
            r" and the run needs about \d+ MB more"
            r" \(.*\); free \d+ MB, then resume: python -m caffe_jacinto.train --resume disk/run"
        )
        assert re.search(message, said), said
        assert "Traceback" not in said
        code, said = trainer.run("--resume", "disk/run")
        assert code == 2, said
        assert f"not enough space on the disk mounted at {tmp_path}/disk" in said
        disk.clear()
        code, said = trainer.run("--resume", "disk/run")
        assert code == 0, said
        assert re.search(r"16 iterations, resumes at iteration (4|8|12)", said)
        assert {state["state"] for state in _states(disk).values()} == {"finished"}


def _states(disk: SmallDisk) -> dict[str, dict[str, str]]:
    record = json.loads((disk.seen_from_here / "run/run.json").read_text())
    states: dict[str, dict[str, str]] = record["stages"]
    return states


@pytest.mark.caffe
def test_a_limit_of_a_files_size_is_named(tmp_path: Path, caffe: Path | None) -> None:
    write_lmdbs(tmp_path)
    trainer = Trainer(caffe, tmp_path)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MEGABYTE, MEGABYTE))  # noqa: E731
    with trainer.start(
        *tiny(recipe_of(tmp_path, "initial"), ("initial",)), "--output", "run", preexec_fn=limit
    ) as process:
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    reason = r"SIGXFSZ \(a file has grown to the limit that ulimit -f shows\)" if caffe else "File too large"
    assert re.search(rf"stage initial failed: .*{reason}", said), said
    assert "to resume: python -m caffe_jacinto.train --resume run" in said
    code, said = trainer.run("--resume", "run")
    assert code == 0, said
    assert (tmp_path / f"run/initial/{PREFIX}_iter_{ITERATIONS}.caffemodel").is_file()


def test_an_error_in_writing_names_the_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", MEGABYTE) as disk:
        program = (
            "import sys; from pathlib import Path; from caffe_jacinto.common.errors import run_command\n"
            "from caffe_jacinto.common.files import write_whole\n"
            "sys.exit(run_command('it', lambda _: write_whole(Path('disk/large'), bytes(1 << 21)) or 0))"
        )
        ran = subprocess.run(
            [*disk.prefix, sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 1
        assert ran.stderr == (
            "it: error: disk/large could not be written: No space left on device: 1 MB are free on "
            f"the disk {tmp_path}/disk; free some space\n"
        )
        assert not list(disk.seen_from_here.iterdir())
    with pytest.raises(FileNotFoundError) as missing:
        write_whole(tmp_path / "no folder/file", "x")
    assert missing.value.filename == str(tmp_path / "no folder/file")


def test_a_disk_that_is_still_full_at_a_resume_says_how_to_go_on(tmp_path: Path) -> None:
    refused = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run.json"))
    says = r"run.json could not be written: .* are free on .*; free some space; to resume: python -m "
    with pytest.raises(RunFailed, match=says), full_disks_named(tmp_path):
        raise refused
    other = OSError(errno.EACCES, "Permission denied", "run.json")
    with pytest.raises(PermissionError), full_disks_named(tmp_path):
        raise other


def test_words_for_disks_and_sizes(tmp_path: Path) -> None:
    assert [size(count) for count in (0, 999, 512_000, 24_400_000, 1_260_000_000)] == [
        *("0 kB", "1 kB", "512 kB", "24 MB", "1.3 GB")
    ]
    assert place_of(Path("/")) == "the disk /"
    assert place_of(Path("/proc/self")).startswith("the disk mounted at /proc (folder /proc/self)")
    assert place_of(tmp_path / "a/b") == place_of(tmp_path)
