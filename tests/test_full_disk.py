"""A disk that is too small, or fills while a stage trains: what is said, and that the run goes on."""

from __future__ import annotations

import errno
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
from digits_run import ITERATIONS, PREFIX, Trainer, recipe_of, tiny, wait_for, write_lmdbs
from small_disk import SmallDisk, small_disk
from test_summary import weights_of_tiny

from caffe_jacinto.common.disk import place_of, size
from caffe_jacinto.common.errors import RunFailed
from caffe_jacinto.common.files import write_whole
from caffe_jacinto.engines.contract import DevicePlan, Engine
from caffe_jacinto.recipes.load import load_recipe
from caffe_jacinto.runs.plan import RunPlan, StagePlan, write_start_weights
from caffe_jacinto.runs.start import full_disks_named
from caffe_jacinto.train import main

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


@pytest.mark.parametrize(
    ("file", "sweep"), [("train.prototxt", False), ("run.sh", False), ("train.prototxt", True)]
)
def test_a_disk_that_is_full_where_a_stage_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, sweep: bool
) -> None:
    """The disk is not full: writing is made to fail as if it were."""
    write_lmdbs(tmp_path)
    monkeypatch.chdir(tmp_path)
    fail_to_write(monkeypatch, file)
    arguments = [*tiny(recipe_of(tmp_path, "sparse"), ("sparse",)), "--set", "stages.sparse.start="]
    arguments += ["--engine", "torch", "--output", "run", *(["--sweep", "target=0.5"] if sweep else [])]
    run = "run/target_0.5" if sweep else "run"
    resume = "python -m caffe_jacinto.train --resume"
    says = (
        rf"the disk .* (is full|was full, or your quota on it used up): .* \({run}/sparse/{file}: No space "
        rf"left on device\); .* resume: {resume} {run}"
    )
    with pytest.raises(RunFailed, match=says) as raised:
        main(arguments)
    assert not sweep or str(raised.value).endswith(f"; to go on with the sweep: {resume} run")
    with pytest.raises(RunFailed, match=says):
        main(["--resume", "run"])


def test_a_disk_that_is_full_where_the_start_weights_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver has to see the system's error, not one that the user could mend in the recipe."""
    weights = weights_of_tiny(tmp_path / "w.caffemodel", 0)
    stage = load_recipe("demo_digits").stages["initial"].model_copy(update={"reinit": ("b",)})
    plan = StagePlan("initial", stage, tmp_path, tmp_path / "x", weights, DevicePlan((), 1, None))
    monkeypatch.setattr(RunPlan, "left_out", lambda *_: frozenset())
    fail_to_write(monkeypatch, "start.caffemodel")
    run = RunPlan(load_recipe("demo_digits"), tmp_path, cast(Engine, None), (), (plan,))
    with pytest.raises(OSError, match="No space left on device"):
        write_start_weights(run, plan)


def fail_to_write(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """Writing files of this name fails, as on a full disk."""

    def fail(path: Path, content: str, *, executable: bool = False) -> None:
        if path.name == file:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_whole(path, content, executable=executable)

    for module in ("networks.stage_files", "runs.plan"):
        monkeypatch.setattr(f"caffe_jacinto.{module}.write_whole", fail)


def test_words_for_disks_and_sizes(tmp_path: Path) -> None:
    assert [size(count) for count in (0, 999, 512_000, 24_400_000, 1_260_000_000)] == [
        *("0 kB", "1 kB", "512 kB", "24 MB", "1.3 GB")
    ]
    assert place_of(Path("/")) == "the disk /"
    assert place_of(Path("/proc/self")).startswith("the disk mounted at /proc (folder /proc/self)")
    assert place_of(tmp_path / "a/b") == place_of(tmp_path)
