"""`caffe-torch` as a command: Caffe's flags, mistakes in a line, ranks that start and stop together."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from small_stage import SmallStage, write_digits

from caffe_jacinto import __version__
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.pytorch.__main__ import main

PROGRAM = [sys.executable, "-m", "caffe_jacinto.engines.pytorch"]
RANKS = (
    "import sys; from caffe_jacinto.engines.pytorch.__main__ import main; "
    "from caffe_jacinto.engines.pytorch.distributed import launch_ranks; "
    "from caffe_jacinto.common.errors import run_command; "
    "sys.exit(run_command('caffe-torch', lambda argv: launch_ranks(argv, 2)))"
)
"""What ``-gpu 0,1`` starts, with the CPU for the two GPUs."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "lmdb")


def run(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)


def test_gpu_lists() -> None:
    for wrong in ("0,", "a", "-1", "0,0", "0 1"):
        with pytest.raises(UserError, match="-gpu"):
            main(["train", "-solver", "s", f"-gpu={wrong}"])


@pytest.mark.caffe
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["train"], "-solver"),
        (["train", "-solver", "none.prototxt"], "none.prototxt: No such file"),
        (["train", "-solver", "s", "-precision", "fp16"], "fp16"),
        (["train", "-solver", "s", "-sparsity_step_iter", "5"], "needs -sparsity_target: add it"),
        (["train", "-solver", "s", "-sparsity_target", "0.5"], "-sparsity_start_iter is missing: add it"),
        (
            ["train", "-solver", "s", "-sparsity_target", "0.5", "-sparsity_start_iter", "-1"],
            "-sparsity_start_iter is -1; it has to be 0 or more",
        ),
        (["train", "-solver", "s", "-weights", "w", "-snapshot", "s"], "not allowed with"),
        (
            ["test", "-model", "none.prototxt", "-weights", "w", "-iterations", "0"],
            "is not a whole number from 1",
        ),
        (["time", "-model", "none.prototxt"], "none.prototxt: No such file"),
        (["device_query", "-gpu", "99"], "-gpu 99: this machine has"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert says in last
    assert "Traceback" not in done.stderr


@pytest.mark.caffe
def test_version_and_gflags_ways_of_writing(digits: Path, tmp_path: Path) -> None:
    assert run("--version").stdout.startswith(f"caffe version {__version__}")
    stage = SmallStage(tmp_path, digits)
    stage.solver(max_iter=2, snapshot=2)
    logs = [
        run("train", *flags, folder=tmp_path)
        for flags in (
            ["-solver", "solver.prototxt"],
            ["--solver=solver.prototxt"],
            ["-solver=solver.prototxt"],
        )
    ]
    assert [log.returncode for log in logs] == [0, 0, 0]
    tested = run(
        *("test", "--model=val.prototxt", "-weights=small_iter_2.caffemodel", "-iterations=2"),
        "-display_sparsity=true",
        folder=tmp_path,
    )
    assert tested.returncode == 0
    assert "Batch 1, accuracy = " in tested.stderr
    assert "Total Sparsity" in tested.stderr


@pytest.mark.caffe
def test_a_comma_in_the_name_of_a_weight_file(digits: Path, tmp_path: Path) -> None:
    """Caffe's list of weight files has commas; a file that exists under the whole name is one file."""
    SmallStage(tmp_path, digits).solver(max_iter=2, snapshot=2)
    assert run("train", "-solver", "solver.prototxt", folder=tmp_path).returncode == 0
    (tmp_path / "small_iter_2.caffemodel").rename(tmp_path / "a,b.caffemodel")
    arguments = ("test", "-model", "val.prototxt", "-iterations", "1", "-weights")
    assert run(*arguments, "a,b.caffemodel", folder=tmp_path).returncode == 0
    both = run(*arguments, "a,b.caffemodel,a,b.caffemodel", folder=tmp_path)
    assert both.returncode == 2
    assert " a: No such file" in both.stderr.splitlines()[-1]


@pytest.mark.caffe
def test_time_says_what_caffe_time_says(digits: Path, tmp_path: Path) -> None:
    SmallStage(tmp_path, digits)
    done = run("time", "-model", "train.prototxt", "-iterations", "3", folder=tmp_path)
    assert done.returncode == 0
    times = dict(re.findall(r"\]\s+(\S+)\tforward: (\S+) ms\.", done.stderr))
    assert {"conv1", "conv1/bn", "conv2", "pool", "fc", "loss"} <= times.keys()
    total = re.search(r"Average Forward-Backward: (\S+) ms\.", done.stderr)
    forward = re.search(r"Average Forward pass: (\S+) ms\.", done.stderr)
    assert total and forward
    assert float(total[1]) > float(forward[1]) > 0.99 * sum(map(float, times.values())) > 0


@pytest.mark.caffe
def test_ranks_train_stop_and_fail_together(digits: Path, tmp_path: Path) -> None:
    stage = SmallStage(tmp_path, digits)
    stage.solver(max_iter=100_000, snapshot=100_000, test_interval=100_000, display=1)
    command = [sys.executable, "-c", RANKS, "train", "-solver", "solver.prototxt"]
    log = tmp_path / "ranks.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=output, start_new_session=True)
    wait_until(lambda: "Iteration 3 " in log.read_text() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0, log.read_text()[-2000:]
    said = log.read_text()
    assert said.count("Iteration 3 (") == 1  # one rank speaks
    assert "2 ranks" in said
    assert "Optimization stopped early." in said
    assert len(list(tmp_path.glob("small_iter_*.solverstate"))) == 1
    (tmp_path / "solver.prototxt").write_text("max_itr: 5\n")
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2
    assert failed.stderr.count("max_itr") == 1
    assert len(failed.stderr.splitlines()) == 1, failed.stderr


@pytest.mark.caffe
def test_ranks_end_with_a_launcher_that_is_killed(digits: Path, tmp_path: Path) -> None:
    """They would keep training, unseen, beside the run when it is started again."""
    stage = SmallStage(tmp_path, digits)
    stage.solver(max_iter=100_000, snapshot=100_000, test_interval=100_000, display=1)
    log = tmp_path / "ranks.log"
    with log.open("w") as output:
        command = [sys.executable, "-c", RANKS, "train", "-solver", "solver.prototxt"]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=output)
    wait_until(lambda: "Iteration 3 " in log.read_text() or process.poll() is not None)
    assert len(processes_in(tmp_path)) > 2, log.read_text()
    process.kill()
    process.wait()
    wait_until(lambda: not processes_in(tmp_path))


def wait_until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < give_up, "it did not come about"
        time.sleep(0.05)


def processes_in(folder: Path) -> list[int]:
    """The processes that work in ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if (entry / "cwd").samefile(folder):
                    found.append(int(entry.name))
    return found
